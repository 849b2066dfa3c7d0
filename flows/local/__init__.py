"""The services of this machine, its processes and runs, and where it keeps its own."""
