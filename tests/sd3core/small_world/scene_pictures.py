"""Pictures for the tests of the small world: scenes by hand, at 64 px, and as an autoencoder gives them back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage

from sd3core.small_world.scenes import Background, Scene, SceneObject, draw_scene, render
from sd3core.small_world.world import COLOURS, SHAPES

PLANTED = ("wrong colour", "wrong shape", "missing", "extra", "half-drawn")
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


def planted(error: str, index: int, thin_bars: bool = True) -> tuple[np.ndarray, Counter, Counter]:
    """A fresh scene with one error of `PLANTED` in it; the kinds it had before; those that the error leaves alone.

    `thin_bars`: a bar may be cut lengthwise too, which an autoencoder draws as it should be.
    """
    scene = draw_scene(201, index, max_objects=3 if error == "extra" else 4)  # a fifth one would touch the others
    rng = np.random.default_rng(index)
    first, *others = scene.objects
    before = kinds(scene.objects)
    if error == "wrong colour":
        colour = str(rng.choice([name for name in COLOURS if name != first.colour]))
        objects = replace(first, colour=colour, rgb=COLOURS[colour]), *others
    elif error == "wrong shape":
        objects = replace(first, shape=str(rng.choice([name for name in SHAPES if name != first.shape]))), *others
    elif error == "missing":
        objects = tuple(others)
    elif error == "extra":
        small = [replace(item, size=min(item.size, 36.0)) for item in scene.objects]
        corners = [(22.0, 22.0), (106.0, 22.0), (22.0, 106.0), (106.0, 106.0), (64.0, 64.0)]
        far = max(corners, key=lambda c: min(np.max(np.abs(np.subtract(c, item.centre))) for item in small))
        return render(replace(scene, objects=(*small, replace(first, centre=far, size=30.0)))), before, before
    elif error == "half-drawn":
        bare = render(replace(scene, objects=tuple(others)))
        y, x = np.mgrid[0 : scene.height, 0 : scene.width]
        halves = [x < first.centre[0], x > first.centre[0]]
        if first.shape != "bar" or thin_bars:
            halves.append(y > first.centre[1])  # a triangle's upper half is a triangle too
        return np.where(halves[index % len(halves)][..., None], render(scene), bare), before, kinds(others)
    return render(replace(scene, objects=objects)), before, kinds(others)
