"""Where a phase starts and what it says of it; which checkpoints are a phase's where a longer one shares its folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flows.upstream import NotFinishedError, Upstream
from sd3core import specs
from sd3core.data.manifest import ManifestRef
from sd3core.data.store import open_store
from sd3core.recipe_file import load_recipe
from workers.stage import NOTHING_TO_DO, StageNote
from workers.trainer.stage import StartPoint, start_point

INPUTS = {"latents": "0", "text": "0", "init": None}


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def fields_of(*overrides: str):
    recipe = load_recipe("tiny-test", list(overrides))
    return specs.train_fields(recipe, recipe.pretrain, **INPUTS), recipe


def start(store, *overrides: str, before: tuple[str, ...] | None = None) -> StartPoint:
    """Of tiny-test's pretraining with these changes, after the run last trained it with those of `before`."""
    fields, recipe = fields_of(*overrides)
    note = None
    if before is not None:
        then, _ = fields_of(*before)
        note = StageNote(folder=specs.checkpoints_folder(recipe, "pretrain", then), digest="d", fields=then)
    folder = specs.checkpoints_folder(recipe, "pretrain", fields)
    ends = recipe.pretrain.last_samples
    job = SimpleNamespace(phase="pretrain", folder=folder, fields=fields, training=recipe.pretrain, last_samples=ends)
    return start_point(store, job, note)


def stand(store, finish_checkpoint, *samples: int) -> None:
    fields, recipe = fields_of()
    for count in samples:
        finish_checkpoint(store, f"{specs.checkpoints_folder(recipe, 'pretrain', fields)}/{count:012d}", recipe)


def test_a_phase_says_why_it_starts_where_it_starts(store, finish_checkpoint):
    assert start(store) == StartPoint(0, "first run", "first run")
    stand(store, finish_checkpoint, 32, 64, 96)
    assert start(store, before=()) == StartPoint(96, NOTHING_TO_DO, NOTHING_TO_DO)
    going_on = "the last whole checkpoint of these settings"
    assert start(store, "pretrain.samples=160", before=()) == StartPoint(96, going_on, "went on from 96 samples")
    assert start(store, "pretrain.samples=40", before=()) == StartPoint(32, going_on, "went on from 32 samples")
    assert start(store, "pretrain.samples=64", before=()).reason == NOTHING_TO_DO
    assert start(store, "pretrain.samples=61", before=()).reason == NOTHING_TO_DO  # whole batches of 8
    other = start(store, "pretrain.learning_rate=0.5", before=())
    assert other == StartPoint(0, "pretrain.learning_rate: 0.001 -> 0.5", "pretrain.learning_rate: 0.001 -> 0.5")


def test_a_length_that_changes_every_rate_is_told(store):
    cosine = "pretrain.schedule=cosine"
    assert start(store, cosine, "pretrain.samples=160", before=(cosine,)).why == (
        "pretrain.samples: 96 -> 160 (under schedule cosine the rate of every step depends on them)"
    )
    assert start(store, cosine, before=()).why == "pretrain.samples: unset -> 96; pretrain.schedule: constant -> cosine"


def test_later_stages_read_the_checkpoints_of_their_own_length(store, finish_checkpoint, monkeypatch):
    """Scores, export and the next phase take what this length has, whatever a longer run left beside it."""
    monkeypatch.setattr(Upstream, "latents", lambda *_: ManifestRef("l", "0"))
    monkeypatch.setattr(Upstream, "text", ManifestRef("t", "0"))
    stand(store, finish_checkpoint, 32, 64, 96)

    def samples(*overrides: str) -> list[int]:
        recipe = load_recipe("tiny-test", list(overrides))
        return [ref.samples for ref in Upstream(recipe, store).checkpoints("pretrain")]

    assert samples() == [32, 64, 96]
    assert samples("pretrain.samples=64") == [32, 64]
    for not_trained in ("pretrain.samples=160", "pretrain.samples=40"):
        with pytest.raises(NotFinishedError, match="pretrain is not finished"):
            samples(not_trained)
