"""Pictures for the tests of the small world: scenes by hand, at 64 px, and as an autoencoder gives them back."""

from __future__ import annotations

from collections import Counter

import numpy as np
from PIL import Image
from scipy import ndimage

from sd3core.small_world.scenes import Background, Scene, SceneObject
from sd3core.small_world.world import COLOURS

PLAIN = Background("plain", (190, 190, 196), (190, 190, 196), 0.0)


def scene_of(*objects: tuple[str, str, float, float, float], side: int = 128) -> Scene:
    """A plain scene of (shape, colour, x, y, size), lengths in 64ths of the side."""
    unit = side / 64
    items = tuple(SceneObject(s, c, (x * unit, y * unit), size * unit, COLOURS[c]) for s, c, x, y, size in objects)
    return Scene("two_objects", items, None, PLAIN, side, side)


def at_64(picture: np.ndarray) -> np.ndarray:
    """The picture with its shorter side at 64 px, resized as for pretraining."""
    scale = 64 / min(picture.shape[:2])
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))


def reconstructed(picture: np.ndarray, seed: int, blur: float = 0.9, noise: float = 6.0) -> np.ndarray:
    """Blurred, noisy and of another contrast, like the output of a small autoencoder."""
    rng = np.random.default_rng(seed)
    soft = ndimage.gaussian_filter(picture.astype(np.float64), (blur, blur, 0))
    changed = (soft - 128) * rng.uniform(0.85, 1.1) + 128 + rng.normal(0, noise, soft.shape)
    return np.clip(changed, 0, 255).round().astype(np.uint8)


def kinds(items) -> Counter:
    return Counter((item.shape, item.colour) for item in items)
