"""What runs on a cluster: the Ray pool, the stages' workers, the trainer."""
