"""Judges rows by what their index and measures say: why each goes, or stays."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sd3core.data.ingest import captions_column
from sd3core.recipe_filter import Filter

# Reasons stand in records and count rows; none has a threshold's value, which the recipe says.
SHORT_SIDE = "shorter side below filter.min_side_px"
TOO_TALL, TOO_WIDE = "aspect below filter.min_aspect", "aspect above filter.max_aspect"
SHORT_CAPTION, LONG_CAPTION = "caption below filter.min_caption_chars", "caption above filter.max_caption_chars"
LACKS_PATTERN, HAS_PATTERN = "caption without filter.caption_requires", "caption with filter.caption_forbids"
NOT_MEASURED = "cannot be decoded any more, or its scores are not finite"
DUPLICATE = "near-duplicate of an image that is kept"
LEAKED = "held out, and near-duplicate of an image to train on"
SCORE_COLUMN = "score_"  # begins a score's column among the measures


def judge_rows(rules: Filter, index: pa.Table, measures: pa.Table | None) -> pa.Array:
    """(n,) strings: why each row of a raw index goes, by the first rule that it breaks; null where it stays.

    `measures`: of the same images, by key, in any order; a row without them could not be decoded, or not be measured.
    """
    width, height = (pc.cast(index[name], pa.float64()) for name in ("width", "height"))
    aspect, side = pc.divide(width, height), pc.min_element_wise(width, height)
    broken: list[tuple[str, pa.ChunkedArray | pa.Array]] = []

    def bound(reason: str, value: pa.ChunkedArray, least: float | None = None, most: float | None = None) -> None:
        if least is not None:
            broken.append((reason, pc.less(value, least)))
        if most is not None:
            broken.append((reason, pc.greater(value, most)))

    bound(SHORT_SIDE, side, least=rules.min_side_px)
    bound(TOO_TALL, aspect, least=rules.min_aspect)
    bound(TOO_WIDE, aspect, most=rules.max_aspect)
    broken += _broken_by_captions(rules, captions_column(index))
    if measures is not None:
        place = pc.index_in(index["key"], value_set=measures["key"])
        broken.append((NOT_MEASURED, pc.is_null(place)))
        for name, score in rules.scores.items():
            value = measures[f"{SCORE_COLUMN}{name}"].take(place)
            bound(below(name), value, least=score.min)
            bound(above(name), value, most=score.max)
    reasons = pa.nulls(len(index), pa.string())
    for reason, breaks in reversed(broken):
        reasons = pc.if_else(pc.fill_null(breaks, False), reason, reasons)
    return reasons.combine_chunks() if isinstance(reasons, pa.ChunkedArray) else reasons


def _broken_by_captions(rules: Filter, captions: list[list[str]]) -> list[tuple[str, pa.Array]]:
    """An image breaks a rule where one of its captions does; one that has none breaks none."""
    each = pa.array([caption for own in captions for caption in own], pa.string())
    image = np.repeat(np.arange(len(captions)), [len(own) for own in captions])
    chars, broken = pc.utf8_length(each), []
    if rules.min_caption_chars is not None:
        broken.append((SHORT_CAPTION, pc.less(chars, rules.min_caption_chars)))
    if rules.max_caption_chars is not None:
        broken.append((LONG_CAPTION, pc.greater(chars, rules.max_caption_chars)))
    if rules.caption_requires is not None:
        broken.append((LACKS_PATTERN, pc.invert(pc.match_substring_regex(each, rules.caption_requires))))
    if rules.caption_forbids is not None:
        broken.append((HAS_PATTERN, pc.match_substring_regex(each, rules.caption_forbids)))
    count = lambda breaks: np.bincount(image[breaks.to_numpy(zero_copy_only=False)], minlength=len(captions))
    return [(reason, pa.array(count(breaks) > 0)) for reason, breaks in broken]


def below(score: str) -> str:
    return f"below filter.scores.{score}.min"


def above(score: str) -> str:
    return f"above filter.scores.{score}.max"
