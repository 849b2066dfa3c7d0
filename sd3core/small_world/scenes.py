"""Draws and describes scenes as pure functions of (seed, index).

The six GenEval tasks are covered evenly. Objects stand on a loose grid: a lone one near the middle, two side by side or
one above the other, three or four near the corners of a square; where exactly, and how large, varies. So a model of a
few minutes' training has to learn what to draw more than where. Objects lie within the central square, do not touch, and
keep a gap, so that a square centre crop loses none and the detector can tell them apart at 64 px. Words are off by default; they are drawn in
grey, which the detector, going by chroma, does not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sd3core.errors import RecipeError
from sd3core.small_world.world import (
    COLOURS,
    MAX_COUNT,
    NUMBERS,
    RELATIONS,
    SHAPES,
    TASKS,
    count_is_reserved,
    pair_is_reserved,
    plural,
    signed_distance,
)

# All lengths below are in 64ths of the central square, that is in pixels at the demo's base size.
WIDTHS = {1: (30.0, 42.0), 2: (22.0, 30.0), 3: (20.0, 25.0), 4: (19.0, 23.0)}  # by the number of objects
MARGIN = 2.5
GAP = 4.0
_CORNERS = ((17.5, 17.5), (46.5, 17.5), (17.5, 46.5), (46.5, 46.5))
LAYOUTS = {  # by the number of objects: centres (x, y) in the central square
    1: (((32.0, 32.0),),),
    2: tuple(permutations(((17.0, 32.0), (47.0, 32.0)))) + tuple(permutations(((32.0, 17.0), (32.0, 47.0)))),
    3: tuple(combinations(_CORNERS, 3)),
    4: (_CORNERS,),
}
JITTER = {1: 4.0, 2: 3.0, 3: 3.0, 4: 3.0}  # how far an object may stand from its layout's place, along each axis
COLOUR_JITTER = 8  # of 255
MAX_TINT = 18  # of 255: how far a background leaves grey
WORDS = ("sun", "moon", "tree", "fish", "bird", "star", "home", "open")
PREFIXES = ("a picture of ", "an image of ", "a drawing of ")
_BARE = 0.6  # share of short descriptions without a prefix
_SHORT = 5  # words that may have a prefix; so no caption has more than 8, and the model spends little on text


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    centre: tuple[float, float]  # x, y in pixels
    size: float  # width, in pixels; placed in a square of that side
    rgb: tuple[int, int, int]  # the colour as drawn


@dataclass(frozen=True)
class Background:
    kind: str  # plain, gradient
    first: tuple[int, int, int]
    second: tuple[int, int, int]
    angle: float  # of the gradient


@dataclass(frozen=True)
class Word:
    text: str
    corner: tuple[float, float]
    height: float
    grey: int


@dataclass(frozen=True)
class Scene:
    task: str  # the GenEval task that it covers
    objects: tuple[SceneObject, ...]
    relation: str | None  # of the first object to the second, where the task is position
    background: Background
    width: int
    height: int
    word: Word | None = None


def scene_rng(seed: int, index: int, purpose: int) -> np.random.Generator:
    """A generator of its own for each (seed, index, purpose): 0 draws the scene, 1 is for describe."""
    return np.random.default_rng([seed, index, purpose])


def scene_size(side_px: int, aspect: float) -> tuple[int, int]:
    """(width, height) of a picture with about the area of a square of `side_px` and width / height = `aspect`."""
    return max(1, round(side_px * aspect**0.5)), max(1, round(side_px / aspect**0.5))


def draw_scene(
    seed: int, index: int, side_px: int = 128, aspect: float = 1.0, max_objects: int = MAX_COUNT, words: float = 0.0
) -> Scene:
    """The scene `index` of the world `seed`, never one of the reserved combinations.

    `words` is the probability of a short word in grey. RecipeError if `max_objects` lies outside 1 to 4.
    """
    if not 1 <= max_objects <= MAX_COUNT:
        raise RecipeError(f"data.max_objects is {max_objects}; the small world draws 1 to {MAX_COUNT} objects")
    rng = scene_rng(seed, index, 0)
    width, height = scene_size(side_px, aspect)
    task = str(rng.choice(TASKS if max_objects > 1 else ("single_object", "colors")))
    kinds = _draw_kinds(task, max_objects, rng)
    relation = str(rng.choice(list(RELATIONS))) if task == "position" else None
    boxes = _place(len(kinds), relation, rng)
    unit = min(width, height) / 64
    left, top = (width - 64 * unit) / 2, (height - 64 * unit) / 2
    objects = tuple(
        SceneObject(shape, colour, (left + x * unit, top + y * unit), size * unit, _jitter(COLOURS[colour], rng))
        for (shape, colour), (x, y, size) in zip(kinds, boxes)
    )
    word = _draw_word(boxes, unit, left, top, rng) if rng.random() < words else None
    return Scene(task, objects, relation, _draw_background(rng), width, height, word)


def _draw_kinds(task: str, max_objects: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    colours = list(COLOURS)
    while True:
        if task in ("single_object", "colors"):
            return [(str(rng.choice(SHAPES)), str(rng.choice(colours)))]
        if task == "counting":
            count = int(rng.integers(2, max_objects + 1))
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice(colours))
            if not count_is_reserved(shape, colour, count):
                return [(shape, colour)] * count
            continue
        shapes = rng.choice(SHAPES, 2, replace=False)
        pair = rng.choice(colours, 2, replace=task != "color_attribution")
        first, second = zip(map(str, shapes), map(str, pair))
        if not pair_is_reserved(first, second):
            return [first, second]


def _place(count: int, relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """(x, y, width) of each object in the central square of side 64: the first fitting one of many drawn at once."""
    low, high = WIDTHS[count]
    layouts = np.array(LAYOUTS[count])  # (layouts, objects, 2)
    for attempt in range(100):
        top = low + (high - low) * max(1 - attempt / 20, 0)  # smaller, should no layout fit
        sizes = rng.uniform(low, top, (256, count))
        centres = layouts[rng.integers(len(layouts), size=256)]
        x, y = np.moveaxis(centres + rng.uniform(-JITTER[count], JITTER[count], centres.shape), -1, 0)
        fits = _inside(x, y, sizes) & _apart(x, y, sizes) & _related(x, y, relation)
        if fits.any():
            first = int(fits.argmax())
            return [(float(a), float(b), float(c)) for a, b, c in zip(x[first], y[first], sizes[first])]
    raise AssertionError(f"no room for {count} objects")


def _inside(x: np.ndarray, y: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For each layout (row): whether all objects keep the margin to the central square's edge."""
    edge = MARGIN + sizes / 2
    return ((np.minimum(x, y) >= edge) & (np.maximum(x, y) <= 64 - edge)).all(1)


def _apart(x: np.ndarray, y: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """For each layout (row): whether the squares that hold the objects keep the gap."""
    first, second = np.triu_indices(x.shape[1], 1)
    distance = np.maximum(np.abs(x[:, first] - x[:, second]), np.abs(y[:, first] - y[:, second]))
    return (distance >= (sizes[:, first] + sizes[:, second]) / 2 + GAP).all(1)


def _related(x: np.ndarray, y: np.ndarray, relation: str | None) -> np.ndarray:
    """For each layout: whether the step from the second to the first object lies within 35 degrees of the relation's
    axis.
    """
    if relation is None:
        return np.ones(len(x), bool)
    step, axis = np.stack([x[:, 0] - x[:, 1], y[:, 0] - y[:, 1]], axis=1), np.array(RELATIONS[relation])
    return np.abs(step @ axis[::-1]) < 0.7 * (step @ axis)


def _jitter(rgb: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    r, g, b = np.clip(np.array(rgb) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3), 0, 255)
    return int(r), int(g), int(b)


def _near_grey(rng: np.random.Generator, grey: float | None = None) -> tuple[int, int, int]:
    grey = rng.uniform(70, 246) if grey is None else grey
    r, g, b = np.clip(grey + rng.uniform(-MAX_TINT / 2, MAX_TINT / 2, 3), 0, 255).round()
    return int(r), int(g), int(b)


def _draw_background(rng: np.random.Generator) -> Background:
    kind = str(rng.choice(("plain", "gradient")))
    first = _near_grey(rng)
    if kind == "plain":
        return Background(kind, first, first, 0.0)
    angle = float(rng.uniform(0, 2 * np.pi))
    second = _near_grey(rng, float(np.clip(np.mean(first) + rng.uniform(-60, 60), 70, 246)))
    return Background(kind, first, second, angle)


def _draw_word(boxes: list, unit: float, left: float, top: float, rng: np.random.Generator) -> Word | None:
    """A word in a free strip of the central square, or None where there is no room."""
    text, height, grey = str(rng.choice(WORDS)), 9.0, int(rng.choice((20, 250)))
    length = height * 0.75 * len(text)
    for x, y in rng.uniform(MARGIN, (64 - MARGIN - length, 64 - MARGIN - height), (60, 2)):
        if all(
            abs(x + length / 2 - bx) > (length + size) / 2 or abs(y + height / 2 - by) > (height + size) / 2
            for bx, by, size in boxes
        ):
            return Word(text, (left + x * unit, top + y * unit), height * unit, grey)
    return None


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 (H, W, 3), with edges antialiased over one pixel."""
    y, x = np.mgrid[0 : scene.height, 0 : scene.width] + 0.5
    canvas = _render_background(scene, x, y)
    for item in scene.objects:
        low = [max(int(c - item.size / 2) - 2, 0) for c in item.centre]
        window = tuple(slice(start, int(start + item.size) + 6) for start in reversed(low))
        u, v = (x[window] - item.centre[0]) / item.size, (y[window] - item.centre[1]) / item.size
        cover = np.clip(0.5 - signed_distance(item.shape, u, v) * item.size, 0, 1)[..., None]
        canvas[window] = (1 - cover) * canvas[window] + cover * np.array(item.rgb)
    picture = np.clip(canvas.round(), 0, 255).astype(np.uint8)
    return picture if scene.word is None else _write_word(picture, scene.word)


def _render_background(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    background, side = scene.background, min(scene.width, scene.height)
    u, v = (x - scene.width / 2) / side, (y - scene.height / 2) / side
    ramp = np.clip(0.5 + 0.7 * (u * np.cos(background.angle) + v * np.sin(background.angle)), 0, 1)[..., None]
    return (1 - ramp) * np.array(background.first) + ramp * np.array(background.second)


def _write_word(picture: np.ndarray, word: Word) -> np.ndarray:
    image = Image.fromarray(picture)
    font = ImageFont.load_default(size=word.height)
    ImageDraw.Draw(image).text(word.corner, word.text, fill=(word.grey,) * 3, font=font, anchor="lt")
    return np.asarray(image)


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """An original caption: short and true, but, as people write them, not always complete.

    The colour of a lone object is never told in the task single_object and half of the time in colors; nor is it always
    that of pairs and counts. A relation is at times left out.
    """
    coloured = {
        "single_object": 0.0,
        "two_objects": 0.4,
        "counting": 0.5,
        "colors": 0.5,
        "position": 0.5,
        "color_attribution": 1.0,
    }
    with_colour = rng.random() < coloured[scene.task]
    first = scene.objects[0]
    if scene.task == "counting":
        text = phrase(first.shape, first.colour if with_colour else None, len(scene.objects))
    elif len(scene.objects) == 1:
        text = phrase(
            first.shape, first.colour if with_colour else None, 1, str(rng.choice(("a", "a", "a", "one", "a single")))
        )
    else:
        article = "one" if scene.relation is None and rng.random() < 0.2 else "a"
        a, b = (phrase(item.shape, item.colour if with_colour else None, 1, article) for item in scene.objects)
        relation = scene.relation if scene.relation and rng.random() < 0.8 else None
        text = f"{a} {relation} {b}" if relation else f"{a} and {b}" if rng.random() < 0.5 else f"{b} and {a}"
    if scene.word is not None:
        text += f' and the word "{scene.word.text}"'
    return frame(text, rng, len(scene.objects) == 1)


def phrase(shape: str, colour: str | None, count: int, article: str = "a") -> str:
    """'a red circle', 'one circle', 'three blue squares'."""
    words = [
        article if count == 1 else NUMBERS[count],
        *([colour] if colour else []),
        shape if count == 1 else plural(shape),
    ]
    return " ".join(words)


def frame(text: str, rng: np.random.Generator, lone: bool) -> str:
    """The phrase alone, or, where it is short, as 'a picture of …'; for a lone object also 'there is …', 'just …', 'only …'."""
    if len(text.split()) > _SHORT or rng.random() < _BARE:
        return text
    return str(rng.choice([*PREFIXES, *(("there is ", "just ", "only ") if lone else ())])) + text
