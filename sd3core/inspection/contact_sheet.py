"""Lays pictures out in cells, each with its number and words below it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd3core.pictures import make_grid
from sd3core.shown_text import printable

TEXT_PX, LINE_PX, LINES = 12, 15, 4
CHARACTERS = 0.52  # width of a character of the font, as a part of its height, on average


SHEET_CELL_PX = 192


def contact_sheet(
    pictures: Sequence[tuple[int, np.ndarray, str]], columns: int = 6, side_px: int = SHEET_CELL_PX
) -> np.ndarray:
    """(H, W, 3) uint8 pictures with their numbers and words -> one picture. Smaller ones are enlarged by whole pixels."""
    return make_grid([_cell(picture, f"{n}. {words}", side_px) for n, picture, words in pictures], columns, 8)


def _cell(picture: np.ndarray, words: str, side_px: int) -> np.ndarray:
    cell = Image.new("RGB", (side_px, side_px + LINES * LINE_PX), "white")
    times = max(1, side_px // max(picture.shape[:2]))
    small = Image.fromarray(picture.repeat(times, axis=0).repeat(times, axis=1))
    small.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    cell.paste(small, ((side_px - small.width) // 2, (side_px - small.height) // 2))
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(TEXT_PX)
    wide = int(side_px / (TEXT_PX * CHARACTERS))
    for number, line in enumerate(textwrap.wrap(printable(words), wide, max_lines=LINES, placeholder=" ...")):
        draw.text((0, side_px + number * LINE_PX), line, fill="black", font=font)
    return np.asarray(cell)
