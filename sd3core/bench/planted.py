"""Pictures with planted near-duplicates, on which finding them is measured.

The distinct ones are drawn scenes, on plain, shaded, striped and clouded grounds, and crops of photographs that do not overlap. A
planted one is a distinct one rescaled, recompressed, cropped by 5 % or mirrored.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sd3core.data.photographs import PHOTOGRAPHS, write_photographs
from sd3core.small_world.scenes import draw_scene, render, scene_rng

GROUNDS = ("as drawn", "shaded", "striped", "clouded")
GROUND = 7  # purpose of scene_rng, besides the scenes' own
CELL_PX = 96  # side of a photograph's crop
PLAIN_BELOW = 8.0  # standard deviation, of 255, below which a crop shows nothing
CROPPED = 0.05  # of each side


@dataclass(frozen=True)
class PlantedPicture:
    """`of`: the distinct picture that it shows; `kind`: how it was made of that, "distinct" where it is the one."""

    key: str
    of: str
    kind: str
    image: Image.Image


def distinct_pictures(scenes: int, seed: int, photographs: Path, odd: bool) -> Iterator[PlantedPicture]:
    """`odd`: crops of every other photograph, beginning with the second, so that two sets share none."""
    for index in range(scenes):
        key = f"scene-{index:06d}"
        yield PlantedPicture(key, key, "distinct", _scene(seed, index))
    paths = [path for path in write_photographs(photographs) if path.stem in sorted(PHOTOGRAPHS)[odd::2]]
    for path in sorted(paths):
        image = Image.open(path).convert("RGB")
        for top in range(0, image.height - CELL_PX + 1, CELL_PX):
            for left in range(0, image.width - CELL_PX + 1, CELL_PX):
                cell = image.crop((left, top, left + CELL_PX, top + CELL_PX))
                if np.asarray(cell.convert("L")).std() >= PLAIN_BELOW:
                    key = f"photo-{path.stem}-{top}-{left}"
                    yield PlantedPicture(key, key, "distinct", cell)


def planted(picture: PlantedPicture, kind: str, rng: np.random.Generator) -> PlantedPicture:
    return PlantedPicture(f"{picture.key}-{kind}", picture.key, kind, ALTERATIONS[kind](picture.image, rng))


def _rescaled(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    scale = 2.0 ** rng.uniform(-1.0, 1.0)
    size = max(16, round(image.width * scale)), max(16, round(image.height * scale))
    method = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)[int(rng.integers(3))]
    return image.resize(size, method)


def _recompressed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    sink = io.BytesIO()
    image.save(sink, ("JPEG", "WEBP")[int(rng.integers(2))], quality=int(rng.integers(25, 91)))
    return Image.open(sink).convert("RGB")


def _cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (round(side * (1 - CROPPED)) for side in image.size)
    left, top = (int(rng.integers(whole - part + 1)) for whole, part in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))


def _mirrored(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


ALTERATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "rescaled": _rescaled,
    "recompressed": _recompressed,
    "cropped": _cropped,
    "mirrored": _mirrored,
}


def _scene(seed: int, index: int) -> Image.Image:
    """A scene of the small world, its ground another where nothing stands on it."""
    aspect = (1.0, 0.75, 1.33)[index % 3]
    scene = draw_scene(seed, index, 128, aspect, words=0.3)
    picture = render(scene).astype(np.float64)
    rng = scene_rng(seed, index, GROUND)
    kind = GROUNDS[index % len(GROUNDS)]
    if kind == "as drawn":
        return Image.fromarray(picture.astype(np.uint8))
    ground = _ground(kind, picture.shape[:2], rng)
    bare = picture.max(axis=2) - picture.min(axis=2) < 40  # objects are coloured, grounds and words near grey
    picture[bare] = 0.5 * picture[bare] + 0.5 * ground[bare]
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


def _ground(kind: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3)."""
    colours = rng.uniform(0, 255, (2, 3))
    if kind == "clouded":
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.float64)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(2, 9) if kind == "striped" else 0.25
    along = x * np.cos(angle) + y * np.sin(angle)
    share = (0.5 + 0.5 * np.sin(2 * np.pi * waves * along + rng.uniform(0, 6)))[..., None]
    return share * colours[0] + (1 - share) * colours[1]
