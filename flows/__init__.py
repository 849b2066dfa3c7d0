"""Prefect flows, one page each, and the `sd3` command."""
