"""Which checkpoint the export stage takes: the last one, or the best by the recipe's score, and what is said of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flows.cli.demo import sample_command
from flows.export import chosen_checkpoint
from sd3core.checkpoint_record import CheckpointRef
from sd3core.data.store import open_store
from sd3core.metrics.best_checkpoint import NoBestCheckpoint
from sd3core.recipe_file import load_recipe
from sd3core.specs import scores_path

REFS = [CheckpointRef(samples, f"runs/tiny-test/checkpoints/finetune.0/s/{samples:012d}") for samples in (16, 32)]


def run_of(tmp_path, *overrides: str):
    upstream = SimpleNamespace(checkpoints=lambda key: REFS, last_checkpoint=lambda key: REFS[-1])
    recipe = load_recipe("tiny-test", list(overrides))
    return SimpleNamespace(recipe=recipe, store=open_store(str(tmp_path)), upstream=upstream)


def test_by_default_it_is_the_last_and_no_score_is_read(tmp_path):
    assert chosen_checkpoint(run_of(tmp_path)) == (REFS[-1], [])


def test_the_best_is_named_with_its_figure_and_the_sample_command_draws_from_it(tmp_path):
    run = run_of(tmp_path, "export.checkpoint=best:validation_loss")
    with pytest.raises(NoBestCheckpoint, match="no checkpoint is scored yet"):
        chosen_checkpoint(run)
    rows = [
        {"checkpoint": ref.folder, "weights": "ema", "protocol": "p", "metric": "validation_loss", "value": value, "count": 8}
        for ref, value in zip(REFS, (1.18, 2.58), strict=True)
    ]  # fmt: skip
    run.store.put_json(scores_path("tiny-test"), {"scores": rows, "left_out": [], "shown": ["p"]})
    ref, [line] = chosen_checkpoint(run)
    assert ref == REFS[0] and "best of 2 by validation_loss (1.180; the last one has 2.580)" in line
    assert " --best-by validation_loss" in " ".join(sample_command(run.recipe))
    assert "--best-by" not in sample_command(run_of(tmp_path).recipe)
