"""Lays out pictures of training captions and of held-out ones side by side.

Left are captions that were trained on, right those that were not, each headed by what it is; in every row the drawn picture
stands beside the real one of its caption. So what a model has learnt by heart is seen beside what it makes of other captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd3core.data.encoded_shards import Split
from sd3core.pictures import BACKGROUND

SMALLEST_CELL_PX = 96  # of its longer side: smaller pictures are enlarged by whole pixels, so that a heading has room
GAP_PX, BETWEEN_HALVES_PX = 2, 10
INK, LINE = (0, 0, 0), (150, 150, 150)
HEADINGS: dict[Split, str] = {"train": "captions trained on", "held_out": "held-out captions"}
DRAWN, REAL = "drawn", "real"
READING = (
    "left: captions that it trained on, right: held-out ones; each drawn, then real"  # where headings are too small
)


@dataclass(frozen=True, eq=False)
class ComparedPicture:
    """A drawn picture and the real one of its caption, (H, W, 3) uint8; None where that cannot be read."""

    split: Split
    caption: str
    drawn: np.ndarray
    real: np.ndarray | None


def comparison_grid(pictures: Sequence[ComparedPicture]) -> np.ndarray:
    """One uint8 picture, halves side by side: training captions first, then held-out ones; a half without a picture is left out."""
    if not pictures:
        raise ValueError("a comparison needs at least one picture")
    shapes = [picture.drawn.shape[:2] for picture in pictures]
    times = max(1, -(-SMALLEST_CELL_PX // max(map(max, shapes))))
    height, width = (times * max(shape[axis] for shape in shapes) for axis in (0, 1))
    halves = {split: [picture for picture in pictures if picture.split == split] for split in HEADINGS}
    parts = [_half(HEADINGS[split], own, times, height, width) for split, own in halves.items() if own]
    rows = max(part.shape[0] for part in parts)
    between = np.full((rows, BETWEEN_HALVES_PX, 3), BACKGROUND, dtype=np.uint8)
    between[:, BETWEEN_HALVES_PX // 2 - 1 : BETWEEN_HALVES_PX // 2 + 1] = LINE
    whole = []
    for part in parts:
        whole += [between] if whole else []
        whole.append(np.pad(part, ((0, rows - part.shape[0]), (0, 0), (0, 0)), constant_values=BACKGROUND))
    return np.concatenate(whole, axis=1)


def captions_in_words(pictures: Sequence[ComparedPicture]) -> list[tuple[str, list[str]]]:
    """(heading, captions from top to bottom) of each half, for a page beside the grid."""
    halves = {split: [picture.caption for picture in pictures if picture.split == split] for split in HEADINGS}
    return [(HEADINGS[split], captions) for split, captions in halves.items() if captions]


def _half(heading: str, pictures: Sequence[ComparedPicture], times: int, height: int, width: int) -> np.ndarray:
    """A heading, the words over the two columns, and a row for each picture."""
    size = max(11, width // 8)
    line = size + size // 3
    top = 2 * line
    shape = (top + len(pictures) * (height + GAP_PX) - GAP_PX, 2 * width + GAP_PX)
    half = np.full((*shape, 3), BACKGROUND, dtype=np.uint8)
    second = width + GAP_PX
    for place, picture in enumerate(pictures):
        y = top + place * (height + GAP_PX)
        for x, image in ((0, picture.drawn), (second, picture.real)):
            if image is not None:
                enlarged = image.repeat(times, axis=0).repeat(times, axis=1)
                half[y : y + enlarged.shape[0], x : x + enlarged.shape[1]] = enlarged
    words = Image.fromarray(half)
    draw = ImageDraw.Draw(words)
    draw.text((0, 0), heading, fill=INK, font=_font(heading, size, shape[1]))
    for x, word in ((0, DRAWN), (second, REAL)):
        draw.text((x, line), word, fill=INK, font=_font(word, size, width))
    return np.asarray(words)


def _font(text: str, size: int, room: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, at most so large that the text fits."""
    font = ImageFont.load_default(size=size)
    length = font.getlength(text)
    return font if length <= room else ImageFont.load_default(size=size * room / length)
