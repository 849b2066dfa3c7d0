"""Which rows of a data set are kept: rules, scores, near-duplicates."""
