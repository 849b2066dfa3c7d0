"""ShapesBench: does a picture show what its prompt asks for? GenEval's six tasks in the small world, judged by the
exact detector.

A picture counts when its objects are the asked ones and nothing else, whole, and the relation holds beyond a margin
(world.relation_holds). Where the prompt names colours, the multiset of (shape, colour) must be the asked one; where it
names none, as in GenEval's single object, two objects and part of counting and position, the multiset of shapes must
be, in any colours.

The prompts are fixed files. Four shapes allow few distinct colourless prompts, so these come in the phrasings that
training captions use. `seen` is false for combinations that training scenes never show: pairs of coloured objects
(position, color_attribution) and coloured counts (counting). The other tasks have no combination to hold out that would
leave every coloured shape seen.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np
from PIL import Image

from sd3core.small_world.detector import UNKNOWN, Detection, detect
from sd3core.small_world.scenes import PREFIXES, draw_scene, phrase, render
from sd3core.small_world.world import (
    COLOURS,
    RELATIONS,
    SHAPES,
    TASKS,
    count_is_reserved,
    pair_is_reserved,
    relation_holds,
)

PROMPTS = Path(__file__).parent / "prompts"
CHANCE = PROMPTS / "chance.json"
CHANCE_SEED, CHANCE_SCENES = 0, 300
GRID_PROMPTS: tuple[str, ...] = (
    "a red circle", "a blue square", "a yellow triangle", "a purple bar",
    "two green triangles", "three cyan circles", "four red squares", "two yellow bars",
    "a blue circle and a yellow square", "a green bar and a red triangle",
    "a purple square and a cyan circle", "a yellow triangle and a blue bar",
    "a red square left of a green circle", "a cyan triangle right of a purple square",
    "a yellow circle above a blue triangle", "a green square below a red bar",
)  # fmt: skip


@dataclass(frozen=True)
class Required:
    shape: str
    colour: str | None  # None: any
    count: int


@dataclass(frozen=True)
class BenchPrompt:
    text: str
    task: str
    objects: tuple[Required, ...]
    relation: str | None  # of the first object to the second
    seen: bool  # False: training scenes never show this combination

    @property
    def coloured(self) -> bool:
        return all(item.colour is not None for item in self.objects)


@dataclass(frozen=True)
class Verdict:
    correct: bool
    reason: str


@dataclass(frozen=True)
class Tally:
    right: int
    pictures: int


@dataclass(frozen=True)
class BenchScore:
    """The score of one task; ShapesBench's overall score is the mean of the six."""

    all: Tally
    seen: Tally  # coloured prompts of training's combinations
    unseen: Tally  # coloured prompts of reserved combinations


def load_prompts(task: str, limit: int | None = None) -> list[BenchPrompt]:
    """A task's fixed prompts; with `limit`, that many spread evenly over the file. ValueError on an unknown task."""
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; ShapesBench has {', '.join(TASKS)}")
    lines = (PROMPTS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    if limit is not None and limit < len(lines):
        lines = [lines[i * len(lines) // limit] for i in range(limit)]
    return [_from_json(line) for line in lines]


def judge(image: np.ndarray, prompt: BenchPrompt) -> Verdict:
    """Whether a uint8 (H, W, 3) picture shows what the prompt asks for, and if not, why not."""
    return judge_detections(detect(image), prompt)


def judge_detections(found: Sequence[Detection], prompt: BenchPrompt) -> Verdict:
    for item in found:
        if UNKNOWN in (item.shape, item.colour):
            return Verdict(False, f"no whole object of the world at ({item.centre[0]:.0f}, {item.centre[1]:.0f})")
    shapes = Counter(item.shape for item in found)
    asked_shapes: Counter[str] = Counter()
    for required in prompt.objects:
        asked_shapes[required.shape] += required.count
    if shapes != asked_shapes:
        return Verdict(False, f"asked for {_listed(asked_shapes)}, shows {_listed(shapes)}")
    kinds = Counter((item.shape, item.colour) for item in found)
    for required in prompt.objects:
        if required.colour is not None and kinds[required.shape, required.colour] < required.count:
            return Verdict(
                False, f"asked for {phrase(required.shape, required.colour, required.count)}, shows {_listed(kinds)}"
            )
    if prompt.relation is not None:
        first, second = (next(item for item in found if _is(item, required)) for required in prompt.objects)
        if not relation_holds(prompt.relation, first.centre, second.centre, (first.size, second.size)):
            return Verdict(False, f"the {first.shape} is not {prompt.relation} the {second.shape}")
    return Verdict(True, "as asked")


def score(results: Iterable[tuple[BenchPrompt, Verdict]]) -> BenchScore:
    """How many of a task's pictures count: in all, and of seen against unseen combinations."""
    results = list(results)
    coloured = [(prompt, verdict) for prompt, verdict in results if prompt.coloured]
    seen, unseen = ([pair for pair in coloured if pair[0].seen is kind] for kind in (True, False))
    return BenchScore(_tally(results), _tally(seen), _tally(unseen))


def chance() -> dict[str, float]:
    """What `chance_levels` measured when the prompts were written; a model that ignores its prompt scores about this."""
    return json.loads(CHANCE.read_text(encoding="utf-8"))


def chance_levels(seed: int = CHANCE_SEED, n: int = CHANCE_SCENES, side_px: int = 64) -> dict[str, float]:
    """Rate at which a random scene, drawn as training's are and seen through the detector, satisfies a random prompt,
    per task.

    Measured over `n` scenes and every prompt of the task.
    """
    prompts = {task: load_prompts(task) for task in TASKS}
    hits = dict.fromkeys(TASKS, 0)
    for index in range(n):
        picture = Image.fromarray(render(draw_scene(seed, index, side_px=2 * side_px)))
        found = detect(np.asarray(picture.resize((side_px, side_px), Image.Resampling.LANCZOS)))
        for task in TASKS:
            hits[task] += sum(judge_detections(found, prompt).correct for prompt in prompts[task])
    return {task: hits[task] / (n * len(prompts[task])) for task in TASKS}


def write_prompts(folder: Path) -> list[Path]:
    """Writes the prompt files, TASK.jsonl, 60 prompts each, and chance.json. The same bytes each time; the package holds what this
    wrote.
    """
    made = {
        "single_object": _single_object(),
        "two_objects": _two_objects(),
        "counting": _counting(),
        "colors": _colors(),
        "position": _position(),
        "color_attribution": _color_attribution(),
    }
    paths = []
    for task in TASKS:
        path = folder / f"{task}.jsonl"
        path.write_text("".join(_to_json(prompt) + "\n" for prompt in made[task]), encoding="utf-8")
        paths.append(path)
    levels = {task: round(level, 4) for task, level in chance_levels().items()}
    path = folder / CHANCE.name
    path.write_text(json.dumps(levels, indent=1) + "\n", encoding="utf-8")
    return [*paths, path]


def _single_object() -> list[BenchPrompt]:
    frames = [prefix + article for prefix in ("", *PREFIXES) for article in ("a", "one", "a single")]
    frames += ["there is a", "just a", "only one"]
    return [
        BenchPrompt(phrase(shape, None, 1, frame), "single_object", (Required(shape, None, 1),), None, True)
        for frame, shape in product(frames, SHAPES)
    ]


def _two_objects() -> list[BenchPrompt]:
    texts = [(f"{prefix}a {a} and a {b}", a, b) for prefix, (a, b) in product(("", *PREFIXES), permutations(SHAPES, 2))]
    texts += [(f"one {a} and one {b}", a, b) for a, b in permutations(SHAPES, 2)]
    return [
        BenchPrompt(text, "two_objects", (Required(a, None, 1), Required(b, None, 1)), None, True)
        for text, a, b in texts
    ]


def _counting() -> list[BenchPrompt]:
    prompts = [
        BenchPrompt(prefix + phrase(shape, None, count), "counting", (Required(shape, None, count),), None, True)
        for prefix, count, shape in product(("", PREFIXES[0]), (2, 3, 4), SHAPES)
    ]
    for seen, count in product((True, False), (2, 3, 4)):
        coloured = [
            BenchPrompt(phrase(shape, colour, count), "counting", (Required(shape, colour, count),), None, seen)
            for shape, colour in product(SHAPES, COLOURS)
            if count_is_reserved(shape, colour, count) is not seen
        ]
        prompts += _pick(coloured, 8 if seen else 4)
    return prompts


def _colors() -> list[BenchPrompt]:
    prompts = []
    for frame, count in (("a", 24), ("one", 24), (PREFIXES[0] + "a", 12)):
        kinds = product(SHAPES, COLOURS)
        framed = [BenchPrompt(phrase(*kind, 1, frame), "colors", (Required(*kind, 1),), None, True) for kind in kinds]
        prompts += _pick(framed, count)
    return prompts


def _position() -> list[BenchPrompt]:
    prompts = []
    for relation in RELATIONS:
        colourless = [_pair("position", (a, None), (b, None), relation) for a, b in permutations(SHAPES, 2)]
        prompts += _pick(colourless, 5)
    for seen, relation in product((True, False), RELATIONS):
        coloured = [
            _pair("position", *kinds, relation) for kinds in _coloured_pairs() if pair_is_reserved(*kinds) is not seen
        ]
        prompts += _pick(coloured, 5)
    return prompts


def _color_attribution() -> list[BenchPrompt]:
    prompts = []
    for seen, shapes in product((True, False), combinations(SHAPES, 2)):
        pairs = [
            (a, b) for a, b in _coloured_pairs() if {a[0], b[0]} == set(shapes) and pair_is_reserved(a, b) is not seen
        ]
        prompts += _pick([_pair("color_attribution", *kinds, None) for kinds in pairs], 5)
    return prompts


def _coloured_pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return [((a, c), (b, d)) for (a, b), (c, d) in product(permutations(SHAPES, 2), permutations(COLOURS, 2))]


def _pair(
    task: str, first: tuple[str, str | None], second: tuple[str, str | None], relation: str | None
) -> BenchPrompt:
    text = f"{phrase(*first, 1)} {relation or 'and'} {phrase(*second, 1)}"
    seen = None in (first[1], second[1]) or not pair_is_reserved(first, second)
    return BenchPrompt(text, task, (Required(*first, 1), Required(*second, 1)), relation, seen)


def _pick(prompts: list[BenchPrompt], count: int) -> list[BenchPrompt]:
    """`count` of the prompts, chosen by the hash of their text: arbitrary, and the same with any version of any
    library.
    """
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest())[:count]


def _to_json(prompt: BenchPrompt) -> str:
    objects = [[item.shape, item.colour, item.count] for item in prompt.objects]
    fields = {
        "prompt": prompt.text,
        "task": prompt.task,
        "objects": objects,
        "relation": prompt.relation,
        "seen": prompt.seen,
    }
    return json.dumps(fields)


def _from_json(line: str) -> BenchPrompt:
    fields = json.loads(line)
    objects = tuple(Required(*item) for item in fields["objects"])
    return BenchPrompt(fields["prompt"], fields["task"], objects, fields["relation"], fields["seen"])


def _is(item: Detection, required: Required) -> bool:
    return item.shape == required.shape and required.colour in (None, item.colour)


def _tally(results: Sequence[tuple[BenchPrompt, Verdict]]) -> Tally:
    return Tally(sum(verdict.correct for _, verdict in results), len(results))


def _listed(kinds: Counter) -> str:
    if not kinds:
        return "nothing"
    names = {kind: kind if isinstance(kind, str) else f"{kind[1]} {kind[0]}" for kind in kinds}
    return ", ".join(f"{count} x {names[kind]}" for kind, count in sorted(kinds.items(), key=str))
