"""Files of this machine: weights read a span at a time, outputs whole or absent, paths as users write them."""
