"""Files of this machine: weights, outputs that are whole or absent, paths."""
