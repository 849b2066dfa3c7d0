"""Judges rows by what their index and measures say: why each goes, or stays."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

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
    caption = pc.fill_null(index["caption"], "")
    captioned, chars = pc.not_equal(caption, ""), pc.utf8_length(caption)
    broken: list[tuple[str, pa.ChunkedArray]] = []

    def bound(reason: str, value: pa.ChunkedArray, least: float | None = None, most: float | None = None) -> None:
        if least is not None:
            broken.append((reason, pc.less(value, least)))
        if most is not None:
            broken.append((reason, pc.greater(value, most)))

    bound(SHORT_SIDE, side, least=rules.min_side_px)
    bound(TOO_TALL, aspect, least=rules.min_aspect)
    bound(TOO_WIDE, aspect, most=rules.max_aspect)
    bound(SHORT_CAPTION, pc.if_else(captioned, chars, None), least=rules.min_caption_chars)
    bound(LONG_CAPTION, chars, most=rules.max_caption_chars)
    if rules.caption_requires is not None:
        found = pc.match_substring_regex(caption, rules.caption_requires)
        broken.append((LACKS_PATTERN, pc.and_(captioned, pc.invert(found))))
    if rules.caption_forbids is not None:
        broken.append((HAS_PATTERN, pc.and_(captioned, pc.match_substring_regex(caption, rules.caption_forbids))))
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


def below(score: str) -> str:
    return f"below filter.scores.{score}.min"


def above(score: str) -> str:
    return f"above filter.scores.{score}.max"
