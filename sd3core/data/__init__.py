"""Images, shards, manifests and batches: everything between a folder and a step."""
