"""What a training phase says of its epochs: in its log, as a warning, and in its table."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from flows import training
from sd3core.checkpoint_record import CheckpointRef
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.recipe_file import load_recipe
from workers.stage import StageResult


@pytest.fixture
def run(tmp_path, finish_checkpoint, monkeypatch):
    """Pretraining of tiny-test, whose steps are not taken, on as many images as `images` says."""
    recipe, store = load_recipe("tiny-test", ["pretrain.max_epochs=60"]), open_store(str(tmp_path))
    ref = CheckpointRef(96, "runs/tiny-test/checkpoints/pretrain/s/000000000096")
    finish_checkpoint(store, ref.folder, recipe)
    made = SimpleNamespace(recipe=recipe, store=store, images=1, warnings=[], report=None, log=logging.getLogger("run"))

    def images(key: str) -> int:
        if not made.images:
            raise DataError("UNCAPTIONED.json: not there or damaged")
        return made.images

    made.upstream, made.warn = SimpleNamespace(images=images, checkpoints=lambda key: [ref]), made.warnings.append
    monkeypatch.setattr(training, "phase_job", lambda run, key: None)
    monkeypatch.setattr(training, "training_view", lambda run, job: nullcontext())
    result = StageResult("pretrain", ref.folder, "d", skipped=False, reason="first run", notes=["another"])
    monkeypatch.setattr(training, "train_stage", lambda *_, **__: result)
    return made


def test_many_epochs_are_warned_of_while_it_trains_and_stand_in_its_outcome(run, caplog):
    with caplog.at_level(logging.INFO):
        result = training.train_phase(run, "pretrain")
    [warning] = run.warnings
    assert warning.startswith("pretrain: 64 epochs of 1 image:") and result.notes == [warning, "another"]
    assert "pretrain: 64.0 epochs of 1 image: max_epochs 60 ends it after 64 of 96 samples" in caplog.text
    [row] = training.phases_table(run, ["pretrain"])
    assert (row["samples"], row["epochs"]) == ("96", "96.0")


def test_few_epochs_are_in_the_log_alone(run, caplog):
    run.images = 32
    with caplog.at_level(logging.INFO):
        assert training.train_phase(run, "pretrain").notes == ["another"]
    assert not run.warnings and "pretrain: 3.0 epochs of 32 images" in caplog.text


def test_a_finished_phase_whose_images_nobody_counted_is_shown_all_the_same(run, caplog):
    run.images = 0
    with caplog.at_level(logging.INFO):
        assert training.train_phase(run, "pretrain").notes == ["another"]
    assert not run.warnings and "epochs" not in caplog.text
    assert [row["epochs"] for row in training.phases_table(run, ["pretrain"])] == ["not known"]
