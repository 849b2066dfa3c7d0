"""The library: the maths, the model, the frozen networks, data and metrics."""
