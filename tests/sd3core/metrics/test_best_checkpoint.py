"""Which checkpoint is the best by a named score, and where the scores do not say."""

from __future__ import annotations

from typing import Any

import pytest

from sd3core.checkpoint_record import CheckpointRef
from sd3core.data.store import Store, open_store
from sd3core.metrics.best_checkpoint import NoBestCheckpoint, best_checkpoint
from sd3core.specs import scores_path

REFS = [CheckpointRef(samples, f"runs/r/checkpoints/pretrain/s/{samples:012d}") for samples in (10, 20, 30)]


def row(ref: CheckpointRef, metric: str, value: float, **more: Any) -> dict[str, Any]:
    fields = {
        "checkpoint": ref.folder,
        "weights": "ema",
        "protocol": "p",
        "metric": metric,
        "value": value,
        "count": 72,
    }
    return fields | more


def rows(metric: str, *values: float, **more: Any) -> list[dict[str, Any]]:
    return [row(ref, metric, value, **more) for ref, value in zip(REFS, values, strict=False)]


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path))


def choose(store: Store, score: str, scores: list[dict[str, Any]], left_out: list[dict[str, Any]] | None = None):
    store.put_json(scores_path("r"), {"scores": scores, "left_out": left_out or [], "shown": ["p", "q"]})
    return best_checkpoint(store, "r", "pretrain", REFS, score)


@pytest.mark.parametrize(
    ("score", "metric", "best"),
    [
        ("validation_loss", "validation_loss", 20),
        ("fid", "clip_fid", 20),
        ("clip_score", "clip_score", 30),
        ("shapes_bench", "shapes_bench/overall", 30),
        ("shapes_bench/colors", "shapes_bench/colors", 30),
    ],
)
def test_lower_or_higher_is_better_by_the_scores_name(store, score, metric, best):
    found = choose(store, score, rows(metric, 0.5, 0.2, 0.9))
    assert (found.ref.samples, found.among, found.last) == (best, 3, 0.9)


def test_the_figure_stands_with_what_it_is_worth(store):
    line = choose(store, "validation_loss", rows("validation_loss", 1.5, 1.18, 2.58)).line
    assert line.startswith(
        "the checkpoint of 20 samples is the best of 3 by validation_loss (1.180; the last one has 2.580)."
    )
    assert "on the same held-out images or prompts, so the figure flatters it" in line


def test_live_weights_other_runs_and_protocols_that_are_not_shown_do_not_count(store):
    own = rows("validation_loss", 3.0, 2.0, 2.5)
    others = [
        *rows("validation_loss", 0.1, 9.0, 9.0, weights="live"),
        *rows("validation_loss", 0.1, 9.0, 9.0, protocol="of another seed"),
        row(CheckpointRef(5, "runs/r/checkpoints/pretrain/t/5"), "validation_loss", 0.1),
    ]
    assert choose(store, "validation_loss", own + others).ref.samples == 20


@pytest.mark.parametrize(
    ("score", "scores", "said"),
    [
        ("loss", [], "no score 'loss' chooses a checkpoint; there are: validation_loss, clip_score, fid, shapes_bench, "),
        ("clip_scor", [], "did you mean clip_score?"),
        ("clip_score", rows("clip_score", 1.0, 2.0), "pretrain: 2 of 3 checkpoints have a clip_score, so none is the best"),
        ("fid", rows("clip_fid", 3.0, 2.0, 1.0, ranks_nothing=True, dimensions=64), "raise evaluate.scored_images to 640"),
        ("clip_score", rows("clip_score", 1.0, 2.0, 2.0), "of 20 and 30 samples have the same clip_score, 2.000"),
        (
            "shapes_bench",
            [*rows("shapes_bench/overall", 0.1, 0.2, count=30, protocol="q"), row(REFS[2], "shapes_bench/overall", 0.3)],
            "have shapes_bench by different protocols (of 30 and 72), which cannot be compared",
        ),
    ],
)  # fmt: skip
def test_what_does_not_say_which_is_refused_in_words(store, score, scores, said):
    with pytest.raises(NoBestCheckpoint) as refused:
        choose(store, score, scores)
    assert said in str(refused.value)


def test_a_tie_below_the_best_is_none(store):
    assert choose(store, "clip_score", rows("clip_score", 1.0, 1.0, 2.0)).ref.samples == 30


def test_a_score_that_was_left_out_says_why(store):
    reason = "FID needs at least 65 generated images"
    with pytest.raises(NoBestCheckpoint, match=reason):
        choose(store, "fid", [], [row(ref, "clip_fid", 0, reason=reason) for ref in REFS])


def test_before_any_score_it_says_which_stage_makes_them(store):
    for damage in (None, b"{"):
        if damage:
            store.put(scores_path("r"), damage)
        with pytest.raises(
            NoBestCheckpoint, match="^run r: no checkpoint is scored yet.*the stage evaluate scores them"
        ):
            best_checkpoint(store, "r", "pretrain", REFS, "fid")
