"""Which rows a filter's rules leave out, row by row, and which recipes are refused."""

from __future__ import annotations

import re

import pyarrow as pa
import pytest

from sd3core import specs
from sd3core.errors import RecipeError
from sd3core.filters.row_rules import judge_rows
from sd3core.recipe_file import load_recipe
from sd3core.recipe_filter import Filter, ScoreRule

ROWS = [(64, 64, "a cat"), (40, 90, "a dog"), (200, 50, ""), (128, 64, "a longer caption"), (64, 128, "buy NOW")]
INDEX = pa.table(
    {
        "key": [f"k{place}" for place in range(len(ROWS))],
        "width": pa.array([row[0] for row in ROWS], pa.int32()),
        "height": pa.array([row[1] for row in ROWS], pa.int32()),
        "caption": [row[2] for row in ROWS],
    }
)
SHARP = ScoreRule(kind="label", model="/m", label="x", min=0.2, max=0.8)
MEASURES = pa.table({"key": ["k4", "k3", "k1", "k0"], "score_sharp": pa.array([0.2, 0.9, 0.1, None], pa.float32())})


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        ({"min_side_px": 51}, {1: "shorter side below filter.min_side_px", 2: "shorter side below filter.min_side_px"}),
        ({"min_aspect": 0.5}, {1: "aspect below filter.min_aspect"}),
        ({"max_aspect": 2.0}, {2: "aspect above filter.max_aspect"}),
        ({"min_caption_chars": 6}, {0: "caption below filter.min_caption_chars", 1: "caption below filter.min_caption_chars"}),
        ({"max_caption_chars": 15}, {3: "caption above filter.max_caption_chars"}),
        ({"caption_requires": "^a "}, {4: "caption without filter.caption_requires"}),
        ({"caption_forbids": r"(?i)\bnow\b"}, {4: "caption with filter.caption_forbids"}),
        ({"min_side_px": 51, "min_aspect": 0.5}, {1: "shorter side below filter.min_side_px", 2: "shorter side below filter.min_side_px"}),
        ({"scores": {"sharp": SHARP}}, {1: "below filter.scores.sharp.min", 2: "cannot be decoded any more, or its scores are not finite", 3: "above filter.scores.sharp.max"}),
    ],
)  # fmt: skip
def test_each_rule_leaves_out_just_what_it_says_and_the_first_is_named(rules, gone):
    measures = MEASURES if "scores" in rules else None
    reasons = judge_rows(Filter(**rules), INDEX, measures).to_pylist()
    assert {place: reason for place, reason in enumerate(reasons) if reason} == gone


def test_an_image_goes_where_one_of_its_captions_breaks_a_rule():
    several = pa.array(
        [["a cat", "a cat that sleeps, buy it"], None, None, ["a longer caption", "a hat"], None], pa.list_(pa.string())
    )
    index = INDEX.append_column("captions", several)
    judged = lambda **rules: [
        place for place, reason in enumerate(judge_rows(Filter(**rules), index, None).to_pylist()) if reason
    ]
    assert judged(caption_forbids="buy") == [0, 4] and judged(max_caption_chars=15) == [0, 3]
    assert judged(caption_requires="^a ") == [4] and judged(min_caption_chars=6) == [0, 1, 3]


def test_of_no_rows_no_reasons():
    assert judge_rows(Filter(min_side_px=5, caption_requires="x"), INDEX.slice(0, 0), None).to_pylist() == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("filter={}", "filter: it has no rule; name one, or leave filter out"),
        ("filter.caption_forbids='(?=x)'", "filter.caption_forbids: '(?=x)' is no regular expression of RE2"),
        ("filter.min_aspct=1", "unknown key filter.min_aspct; did you mean 'min_aspect'?"),
        ("filter={min_aspect: 2, max_aspect: 1}", "min_aspect 2 is above max_aspect 1: everything would be left out"),
        ("filter.duplicates.model=/m", "threshold must be given with a model"),
        ("filter.duplicates={model: m, threshold: 0.9}", "model m is no whole path of this machine"),
        ("filter.scores.a={kind: label, model: /m, label: x}", "give min, max or both"),
        ("filter.scores.a={kind: label, model: /m, head: /h, min: 1}", "kind 'label' takes label, and not head"),
        ("filter.scores.A={kind: label, model: /m, label: x, min: 1}", "filter.scores.A"),
    ],
)
def test_a_filter_that_cannot_be_is_refused_in_one_line(override, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny-test", [override])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_what_looks_at_images_has_a_spec_of_its_own_and_thresholds_are_not_in_it(monkeypatch):
    monkeypatch.setattr(specs, "model_identity", lambda folder, key: f"identity of {folder}")
    score = "filter.scores.sharp={kind: label, model: /m, label: x, min: 0.5}"

    def spec(*overrides: str) -> tuple[str, str]:
        recipe = load_recipe("tiny-test", ["filter.duplicates={}", score, *overrides])
        return specs.measures_folder(recipe), specs.keep_folder(recipe)

    plain = spec()
    for changed in ("filter.min_side_px=9", "filter.duplicates.threshold=0.9", "filter.scores.sharp.min=0.6"):
        assert spec(changed)[0] == plain[0] and spec(changed)[1] != plain[1], changed
    for changed in ("filter.scores.sharp.model=/other", "filter.scores.sharp.label=y", "data.max_objects=1"):
        assert not {*spec(changed)} & {*plain}, changed
    assert not {*spec("filter.duplicates={model: /m, threshold: 0.985}")} & {*plain}
    for same in ("filter.duplicates.threshold=0.985", "filter.duplicates.batch=1", "filter.scores.sharp.batch=1"):
        assert spec(same) == plain, same
    moved = spec("filter.scores.sharp.model=/m")
    assert moved == plain and re.fullmatch(r"datasets/tiny-world/keep/[0-9a-f]{12}", plain[1])
