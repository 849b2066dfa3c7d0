"""The `sd3` command: what it can be told, and what it prints."""
