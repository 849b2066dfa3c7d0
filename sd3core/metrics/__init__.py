"""Scores of a model: validation loss, CLIP score, Fréchet distance. Each is a `Score`, or `LeftOut` with the reason."""

from sd3core.metrics.score import LeftOut, Score, too_few

__all__ = ["LeftOut", "Score", "too_few"]
