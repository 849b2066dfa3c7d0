"""What Prefect's pages show of a stage: progress, tables, curves and pictures."""
