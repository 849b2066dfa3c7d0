"""The frozen networks beside the model: VAE, text encoders, judge."""
