"""Pictures for people: grids, PNG files with their settings, thumbnails."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd3core.shown_text import printable

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 255  # between the pictures of a grid


def to_uint8(images: Tensor) -> np.ndarray:
    """images (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded to the nearest level."""
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return levels.round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()


def make_grid(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Pictures (H, W, 3) uint8, row by row, each in a cell of the largest height and width. -> one uint8 picture."""
    if not images:
        raise ValueError("a grid needs at least one picture")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), BACKGROUND, dtype=np.uint8)
    for position, image in enumerate(images):
        top, left = (position // columns) * (height + gap), (position % columns) * (width + gap)
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def encode_png(image: np.ndarray, settings: Mapping[str, object] | None = None) -> bytes:
    """PNG bytes of (H, W, 3) uint8 with one text chunk a setting, in UTF-8.

    Line breaks stay as they are; what else must not reach a terminal is escaped, since readers print the chunks there.
    """
    chunks = PngInfo()
    for key, value in (settings or {}).items():
        chunks.add_itxt(key, "\n".join(map(printable, str(value).split("\n"))))
    return _encode(Image.fromarray(image), format="PNG", pnginfo=chunks)


def read_settings(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return {key: str(value) for key, value in image.text.items()}


def thumbnail_jpeg(image: np.ndarray, max_side: int = 480, quality: int = 80) -> bytes:
    """A small JPEG for a page, at most `max_side` px on its longer side."""
    small = Image.fromarray(image)
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return _encode(small, format="JPEG", quality=quality, optimize=True)


def page_jpeg(image: np.ndarray, side: int = 640) -> bytes:
    """A JPEG for a page that shows every pixel as one: smaller pictures are enlarged by whole pixels."""
    times = max(1, side // max(image.shape[:2]))
    return thumbnail_jpeg(image.repeat(times, axis=0).repeat(times, axis=1), side)


def _encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()
