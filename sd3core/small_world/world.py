"""What the small world is made of: colours, shapes, relations, counts.

It also names the combinations that are reserved for ShapesBench.

Lengths of shapes are in units of the shape's width (its size); x points right, y points down, the origin is the centre
of the shape's box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Six hues at least 45 degrees apart. Backgrounds stay near grey, so a pixel's chroma tells object from background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 42),
    "yellow": (245, 208, 24),
    "green": (20, 168, 52),
    "cyan": (28, 200, 214),
    "blue": (42, 70, 218),
    "purple": (162, 50, 196),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "bar")
RELATIONS: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
MAX_COUNT = 4
MIN_SIDE_PX = 48  # of a picture whose objects the detector can tell
TASKS: tuple[str, ...] = ("single_object", "two_objects", "counting", "colors", "position", "color_attribution")

_BAR = 0.4  # height of a bar of width 1: a square cut in half (0.5) is no bar
AREAS: dict[str, float] = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "bar": _BAR}
CENTROIDS_Y: dict[str, float] = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "bar": 0.0}


def plural(shape: str) -> str:
    return shape + "s"


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape of width 1: negative inside. Exact near edges, a bound near corners."""
    if shape == "circle":
        return np.hypot(x, y) - 0.5
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.5
    if shape == "triangle":  # apex up, base down
        return np.maximum((np.abs(x) - (y + 0.5) / 2) / np.sqrt(1.25), y - 0.5)
    if shape == "bar":  # lies flat
        return np.maximum(np.abs(x) - 0.5, np.abs(y) - _BAR / 2)
    raise ValueError(f"unknown shape {shape!r}; the world has {', '.join(SHAPES)}")


def pair_is_reserved(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """True for the pairs of (shape, colour) that training scenes never show: 36 of the 216 pairs of different shapes.

    A Latin square per pair of shapes: each coloured shape loses one of six colours of each other shape, so that every
    coloured shape, every pair of shapes and every pair of colours is still seen. The order of the two does not matter.
    """
    (shape_a, colour_a), (shape_b, colour_b) = sorted((first, second), key=lambda item: SHAPES.index(item[0]))
    if shape_a == shape_b:
        return False
    colours = tuple(COLOURS)
    offset = SHAPES.index(shape_a) + 2 * SHAPES.index(shape_b)
    return (colours.index(colour_a) + colours.index(colour_b) + offset) % len(COLOURS) == 0


def count_is_reserved(shape: str, colour: str, count: int) -> bool:
    """True for the (shape, colour, count) that training scenes never show: 12 of the 72 with two to four objects."""
    return count > 1 and (tuple(COLOURS).index(colour) + SHAPES.index(shape) + count) % len(COLOURS) == 0


def relation_holds(relation: str, first: Sequence[float], second: Sequence[float], sizes: tuple[float, float]) -> bool:
    """Whether `first` (centre x, y) stands in `relation` to `second`, beyond a margin.

    The step between the centres along the relation's axis must exceed half the mean width of the two objects, and the
    direction must lie within 60 degrees of the axis (as in GenEval, an object up and to the left is both above and
    left).
    """
    step = np.subtract(first, second)
    along = float(step @ np.array(RELATIONS[relation]))
    return along > 0.25 * sum(sizes) and along > 0.5 * float(np.hypot(*step))


def clear_relation(first: Sequence[float], second: Sequence[float], sizes: tuple[float, float]) -> str | None:
    """The one relation of `first` to `second` that a person would name, or None where they stand diagonally."""
    for relation, axis in RELATIONS.items():
        step = np.subtract(first, second)
        along, across = step @ np.array(axis), abs(step @ np.array(axis[::-1]))
        if across < 0.8 * along and relation_holds(relation, first, second, sizes):
            return relation
    return None
