"""A picture as coloured text: each character is two pixels, one above the other."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

UPPER_HALF = "▀"
MANY_COLOURS = ("256", "truecolor")


def can_show_pictures(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system in MANY_COLOURS


def half_blocks(picture: bytes, columns: int, rows: int) -> Text:
    """The picture (PNG or JPEG) in at most so many columns and rows of text, never enlarged.

    The character's colour is the upper pixel, its background the lower one.
    """
    with Image.open(io.BytesIO(picture)) as image:
        scale = min(columns / image.width, 2 * rows / image.height, 1.0)
        size = max(1, round(image.width * scale)), 2 * max(1, round(image.height * scale / 2))
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))  # (2 * rows, columns, 3)
    text = Text(no_wrap=True)
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        for above, below in zip(upper, lower, strict=True):
            text.append(UPPER_HALF, Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below)))
        text.append("\n")
    return text
