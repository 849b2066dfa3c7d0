"""How the small towers are made."""
