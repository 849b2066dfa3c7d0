"""Aspect buckets: sides whose product is near a target area.

Both are multiples of what a patch covers. Paper section 5.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Side = tuple[int, int]  # height, width in px
DOWNSAMPLING = 8  # px of an image to a place of its latent, each way: the VAE's
PATCH_PX = 2 * DOWNSAMPLING  # a patch is 2 x 2 places
MERGED_CROP = 0.1  # of an image, that may be cut off so that it joins a bucket whose images fill a batch


def bucket_sides(side_px: int, aspect_ratios: Sequence[float], multiple: int = PATCH_PX) -> list[Side]:
    """(height, width) for each width / height ratio, with height * width near side_px ** 2. Equal ones stand once, in
    order.
    """
    sides: list[Side] = []
    for ratio in aspect_ratios:
        height = max(multiple, round(side_px / math.sqrt(ratio) / multiple) * multiple)
        width = max(multiple, round(side_px * math.sqrt(ratio) / multiple) * multiple)
        if (height, width) not in sides:
            sides.append((height, width))
    return sides


def buckets_for_area(
    side_px: int, multiple: int | None = None, max_ratio: float = 4.0, min_area: float = 0.9
) -> list[Side]:
    """Every (height, width) of multiples of `multiple` px with min_area <= height * width / side_px^2 <= 1 whose longer
    side is at most max_ratio times the shorter; tallest first.

    This rule gives the buckets of SDXL and PixArt at 1024 px with multiples of 64, and PixArt's at 512 px with 32: the
    paper cites them and gives no list. `multiple`: None takes side_px / 16 in whole patches, so that other areas get
    the same list scaled.
    """
    step = multiple or max(PATCH_PX, side_px // 16 // PATCH_PX * PATCH_PX)
    area = side_px**2
    longest = int(side_px * math.sqrt(max_ratio))
    sides = range(step, longest + step, step)
    return [
        (height, width)
        for height in reversed(sides)
        for width in sides
        if min_area * area <= height * width <= area and max(height, width) <= max_ratio * min(height, width)
    ]


def off_centre(sides: Sequence[Side], table_px: int) -> list[Side]:
    """The sides whose patches cannot lie in the middle of a square position table of `table_px`: half a patch off, up or
    left, since the released code crops whole places of the table.
    """
    return [side for side in sides if any((table_px - px) // PATCH_PX % 2 for px in side)]


def nearest_bucket(width: int, height: int, buckets: Sequence[Side]) -> Side:
    """The bucket whose aspect is nearest to the image's on a logarithmic scale, where 2:1 and 1:2 are equally far from
    1:1.
    """
    wanted = math.log(width / height)
    return min(buckets, key=lambda side: abs(math.log(side[1] / side[0]) - wanted))


def nearest_places(sizes: np.ndarray, buckets: Sequence[Side]) -> np.ndarray:
    """The places (n,) in `buckets` of the nearest_bucket of each size (n, 2), width and height: of millions in seconds."""
    aspects = np.log([width / height for height, width in buckets])
    distances = np.abs(aspects - np.log(sizes[:, :1] / sizes[:, 1:]))  # (n, buckets)
    places = distances.argmin(axis=1)
    nearest = distances[np.arange(len(sizes)), places]
    # the last bit of a logarithm decides nothing: who is in the middle is asked of the one rule
    doubtful = np.flatnonzero((distances < nearest[:, None] + 1e-9).sum(axis=1) > 1)
    for row in doubtful.tolist():
        places[row] = buckets.index(nearest_bucket(*sizes[row].tolist(), buckets))
    return places


def cut_off(side: Side, other: Side) -> float:
    """The share of an image of one side's aspect that is cut off to fill the other: 1 - min(a / b, b / a) of their aspects.

    Of any image whose nearest bucket is `side` no larger share is cut off in addition.
    """
    across, down = side[1] * other[0], other[1] * side[0]
    # of whole numbers, so exact to the last bit: no machine may order two buckets otherwise
    return 1 - min(across, down) / max(across, down)


def merged_buckets(rows: Mapping[Side, int], global_batch: int) -> dict[Side, Side]:
    """Where the images of buckets go that have some, but fewer `rows` than a batch: to the nearest bucket that fills one.

    A bucket farther than MERGED_CROP from all of those stays by itself. Where none fills a batch, the fullest is taken for one.
    Each bucket is judged by its own rows, not by what others bring it: a row more changes nothing, but where its bucket now
    fills a batch (or none does, and it is now the fullest), and then for that bucket and the small ones that it is nearest to.
    """
    there = {side: count for side, count in rows.items() if count}
    full = [side for side, count in there.items() if count >= global_batch]
    if there and not full:
        full = [max(there, key=lambda side: (there[side], side))]
    merged = {}
    for side in there.keys() - set(full):
        target = min(full, key=lambda other: (cut_off(side, other), other))
        if cut_off(side, target) <= MERGED_CROP:
            merged[side] = target
    return dict(sorted(merged.items()))


def bucket_name(side: Side) -> str:
    """`HEIGHTxWIDTH` in px, as it stands in an index."""
    return f"{side[0]}x{side[1]}"


def bucket_side(name: str) -> Side:
    """(height, width) of what bucket_name says."""
    height, width = name.split("x")
    return int(height), int(width)
