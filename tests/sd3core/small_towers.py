"""Towers of a few steps on random drawings, for tests that need real ones and no good ones."""

from __future__ import annotations

import numpy as np

from sd3core.recipe import SmallClip, SmallT5, SmallTowers, SmallVae

_CLIP = {"width": 32, "layers": 2, "heads": 2, "projection": 32, "image_px": 32, "batch": 8, "steps": 3}
TINY = SmallTowers(
    images=32,
    vocabulary=640,
    vae=SmallVae(channels=(8, 8, 16, 16), crop_px=32, batch=4, steps=4),
    clip_l=SmallClip(**_CLIP, seed=1),
    clip_g=SmallClip(**_CLIP | {"projection": 48}, seed=2),
    t5=SmallT5(width=64, layers=1, heads=2, batch=8, steps=4, seed=3),
    judge=SmallClip(**_CLIP, seed=4),
)


def drawings(count: int, seed: int = 0) -> tuple[list[np.ndarray], list[str]]:
    """Pictures of several sizes, each with one bright rectangle, and what it shows."""
    generator = np.random.default_rng(seed)
    colours = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
    pictures, captions = [], []
    for _ in range(count):
        height, width = generator.integers(40, 90, 2)
        picture = np.full((height, width, 3), generator.integers(60, 200, 3), dtype=np.uint8)
        colour, form = generator.choice(list(colours)), generator.choice(["square", "bar"])
        tall = 20 if form == "square" else 8
        top, left = generator.integers(height - tall), generator.integers(width - 20)
        picture[top : top + tall, left : left + 20] = colours[colour]
        place = "left" if left < width / 2 - 10 else "right"
        pictures.append(picture)
        captions.append(f"a {colour} {form} on the {place}")
    return pictures, captions
