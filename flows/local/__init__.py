"""What is this machine's own: home, Prefect's server and worker, processes, runs."""
