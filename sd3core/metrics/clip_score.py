"""CLIP score, and the features that FID compares, by the judging CLIP.

The judging CLIP (sd3core.towers.judge) conditions nothing.

The paper's scale: the plain cosine (about 0.25 for good models with CLIP L/14), not torchmetrics' hundredfold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sd3core.metrics.score import LeftOut, Score, too_few
from sd3core.towers.judge import Judge, clip_pixels

MIN_IMAGES = 8


@torch.no_grad()
def image_embeddings(judge: Judge, images: Sequence[np.ndarray] | np.ndarray, batch: int = 64) -> np.ndarray:
    """uint8 (H, W, 3) pictures -> (n, D) float32, projected and not brought to unit length: FID keeps CLIP's own
    scale.
    """
    config = judge.vision.config
    features = np.zeros((len(images), config.projection_dim), dtype=np.float32)
    for start in range(0, len(images), batch):
        pixels = clip_pixels(images[start : start + batch], config.image_size)
        embedded = judge.vision(pixels.to(judge.vision.device, judge.vision.dtype)).image_embeds
        features[start : start + len(embedded)] = embedded.float().cpu().numpy()
    return features


def cosines(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """(n, D) and (n, D) of any lengths -> (n,) in [-1, 1], float64."""
    images, texts = (np.asarray(features, dtype=np.float64) for features in (image_features, text_features))
    return (images * texts).sum(axis=1) / (np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1))


def clip_score(
    image_features: np.ndarray, text_features: np.ndarray, real: tuple[np.ndarray, np.ndarray] | None = None
) -> Score | LeftOut:
    """Mean cosine of each picture and its own prompt.

    `real`: (which of the prompts have one, features of the real pictures of these), whose own score stands beside it.
    """
    if len(image_features) < MIN_IMAGES:
        return too_few("CLIP score", len(image_features), MIN_IMAGES, "pictures of held-out prompts")
    beside = {}
    if real is not None and len(real[0]) >= MIN_IMAGES:
        of_real = cosines(real[1], text_features[real[0]])
        beside["real"] = {"value": float(of_real.mean()), "count": len(of_real)}
    return Score(float(cosines(image_features, text_features).mean()), len(image_features), beside)
