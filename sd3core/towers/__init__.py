"""The frozen networks beside the model: autoencoder, text encoders, judge and captioner."""
