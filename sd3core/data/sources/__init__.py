"""Images that come in tars or parquet files, on this machine or in a bucket."""
