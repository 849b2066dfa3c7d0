"""Captions a drawn scene from its pixels alone, and leaves nothing out.

It looks through the detector.

It plays the part that a vision-language model has on real data: counts, colours, shapes and the relation, in one short
sentence.
"""

from __future__ import annotations

import zlib

import numpy as np

from sd3core.small_world.detector import UNKNOWN, Detection, detect
from sd3core.small_world.scenes import phrase
from sd3core.small_world.world import COLOURS, NUMBERS, SHAPES, clear_relation, plural


def caption_from_pixels(image: np.ndarray) -> str:
    """One complete sentence for a uint8 (H, W, 3) picture; 'an empty picture' where no whole object stands.

    Of two objects either may come first. Which one hangs on the pixels alone, so the same picture always has the same
    caption.
    """
    objects = [item for item in detect(image) if UNKNOWN not in (item.shape, item.colour)]
    turned = bool(zlib.crc32(np.ascontiguousarray(image).tobytes()) & 1)
    if len(objects) == 2 and (objects[0].shape, objects[0].colour) != (objects[1].shape, objects[1].colour):
        return _caption_pair(*(objects[::-1] if turned else objects))
    return _caption_groups(objects, turned)


def _caption_pair(first: Detection, second: Detection) -> str:
    relation = clear_relation(first.centre, second.centre, (first.size, second.size)) or "and"
    return f"{phrase(first.shape, first.colour, 1)} {relation} {phrase(second.shape, second.colour, 1)}"


def _caption_groups(objects: list[Detection], turned: bool) -> str:
    kinds = [(item.shape, item.colour) for item in objects]
    groups = sorted(set(kinds), key=lambda kind: (SHAPES.index(kind[0]), list(COLOURS).index(kind[1])), reverse=turned)
    counts = [(shape, colour, kinds.count((shape, colour))) for shape, colour in groups]
    parts = [phrase(*kind) if kind[2] in NUMBERS else f"many {kind[1]} {plural(kind[0])}" for kind in counts]
    if not parts:
        return "an empty picture"
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else parts[0]
