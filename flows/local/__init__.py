"""This machine's services, processes and runs, and where it keeps its own."""
