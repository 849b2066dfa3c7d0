"""Captions by models: who writes them, which are thrown out, what is counted."""
