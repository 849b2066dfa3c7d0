"""A run by its name: the recipe that its checkpoint keeps, the newest checkpoint, and the runs that there are."""

from __future__ import annotations

import io
import os
import time

import pytest
from rich.console import Console

from flows.cli import commands, sample
from flows.cli.demo import sample_command
from flows.cli.trained_runs import trained_run
from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.store import open_store
from sd3core.errors import RecipeError, UserError
from sd3core.files.local_paths import shown_place
from sd3core.recipe_file import load_recipe
from workers.stage import remember_stage

SETTINGS = ["run=photos-1", "text.t5_tokens=32", "evaluate.guidance_scale=7", "model.depth=2"]


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "home" / "store"))


@pytest.fixture
def finish(store, finish_checkpoint):
    """Writes a finished checkpoint's mark."""

    def write(recipe, phase: str, samples: int, spec: str = "aaaa") -> str:
        folder = f"runs/{recipe.run}/checkpoints/{phase}/{spec}/{samples:012d}"
        finish_checkpoint(store, folder, recipe)
        return folder

    return write


def of_store(recipe, store):
    return recipe.model_copy(update={"store": store.url})


def test_the_recipe_is_that_of_the_newest_checkpoint_of_the_last_phase(store, finish):
    recipe = load_recipe("tiny-test", SETTINGS)
    finish(recipe, "pretrain", 96)
    finish(recipe, "finetune.0", 8)
    last = finish(recipe, "finetune.0", recipe.finetune[-1].samples)
    found = trained_run(store, "photos-1")
    assert (found.checkpoint, found.recipe, found.unfinished) == (store.uri(last), of_store(recipe, store), "")
    assert found.phase == recipe.finetune[-1]
    assert trained_run(store, "photos-1", ["evaluate.num_steps=3"]).recipe.evaluate.num_steps == 3
    with pytest.raises(
        RecipeError, match="^--run photos-1: the recipe in file:///.*DONE.json: unknown key evaluate.steps"
    ):
        trained_run(store, "photos-1", ["evaluate.steps=3"])


def test_a_run_that_its_epochs_ended_is_finished(store, finish, finish_checkpoint):
    recipe = load_recipe("tiny-test", [*SETTINGS, "finetune.0.max_epochs=0.2"])
    folder = finish(recipe, "finetune.0", 16)
    done = store.get_json(f"{folder}/DONE.json")
    for samples, unfinished in ((16, False), (24, True)):
        store.put_json(f"{folder}/DONE.json", done | {"training": {"samples": samples}})
        said = trained_run(store, "photos-1").unfinished
        assert said.endswith("after 16 of 24 samples") if unfinished else not said


def test_an_unfinished_run_gives_its_newest_checkpoint_and_says_so(store, finish):
    recipe = load_recipe("tiny-test", SETTINGS)
    for samples in (32, 64):
        newest = finish(recipe, "pretrain", samples)
    found = trained_run(store, "photos-1")
    assert found.checkpoint == store.uri(newest)
    assert (
        found.unfinished
        == f"run photos-1 is not trained to its end: this is pretrain after 64 of {recipe.pretrain.samples} samples"
    )
    newest = finish(recipe, "finetune.0", 8)
    assert trained_run(store, "photos-1").checkpoint == store.uri(newest)


def test_ten_phases_are_in_their_order(store, finish):
    recipe = load_recipe("tiny-test", SETTINGS)
    many = recipe.model_copy(update={"finetune": recipe.finetune * 11})
    for phase in ("finetune.2", "finetune.10", "pretrain"):
        finish(many, phase, many.finetune[0].samples)
    assert "/finetune.10/" in trained_run(store, "photos-1").checkpoint


def test_of_two_trainings_of_a_phase_the_one_that_the_run_ended_is_taken(store, finish):
    recipe = load_recipe("tiny-test", SETTINGS)
    ended = finish(recipe, "finetune.0", 8, "bbbb")
    finish(recipe, "finetune.0", 800, "aaaa")  # of other settings, before
    remember_stage(store, "photos-1", "finetune.0", ended.rpartition("/")[0], "0" * 64, {}, ())
    assert trained_run(store, "photos-1").checkpoint == store.uri(ended)


def test_after_a_training_was_made_shorter_the_checkpoint_that_it_ended_with_is_taken(store, finish):
    """Under a constant rate both stand in one folder, and the checkpoint keeps the recipe of the longer one."""
    longer = load_recipe("tiny-test", [*SETTINGS, "finetune.0.samples=800"])
    ended = finish(longer, "finetune.0", 8)
    finish(longer, "finetune.0", 800)
    folder = ended.rpartition("/")[0]
    remember_stage(store, "photos-1", "finetune.0", folder, read_checkpoint_done(store, ended).digest, {}, ())
    found = trained_run(store, "photos-1")
    assert (found.checkpoint, found.unfinished) == (store.uri(ended), "")


def test_a_training_that_is_being_made_longer_gives_its_newest_checkpoint(store, finish):
    recipe = load_recipe("tiny-test", [*SETTINGS, "finetune.0.samples=800"])
    ended = finish(recipe, "finetune.0", 8)
    remember_stage(
        store, "photos-1", "finetune.0", ended.rpartition("/")[0], read_checkpoint_done(store, ended).digest, {}, ()
    )
    newest = finish(recipe, "finetune.0", 400)
    later = time.time() + 10
    os.utime(shown_place(store.uri(f"{newest}/DONE.json")), (later, later))
    found = trained_run(store, "photos-1")
    assert found.checkpoint == store.uri(newest)
    assert found.unfinished == "run photos-1 is not trained to its end: this is finetune.0 after 400 of 800 samples"


@pytest.mark.parametrize("run", ["other", "..", "a/b", "", "\x1b[2J", "x" * 5000])
def test_a_run_that_is_not_there_names_those_that_are(store, finish, run):
    with pytest.raises(UserError, match="no run in file:///.* has a checkpoint"):
        trained_run(store, run)
    for name in ("b", "a"):
        finish(load_recipe("tiny-test", [f"run={name}"]), "pretrain", 8)
    with pytest.raises(UserError, match="no checkpoint of such a run in file:///.*; there are: a, b$"):
        trained_run(store, run)


def test_sample_and_the_line_that_the_demo_prints(store, finish, monkeypatch, tmp_path, sd3):
    """End to end but for the drawing: the printed words, pasted, draw from the run's checkpoint with its settings."""
    recipe = load_recipe("tiny-test", SETTINGS)
    finish(recipe, "pretrain", recipe.pretrain.samples)
    last = finish(recipe, "finetune.0", recipe.finetune[-1].samples)
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    asked = {}
    monkeypatch.setattr(sample, "_towers", lambda of, checkpoint, given: asked.update(recipe=of) or tmp_path)
    monkeypatch.setattr(commands, "console", Console(file=io.StringIO()))

    def draw(checkpoint, towers, draws, out, *, on_step, **options):
        asked.update(options, draws=draws, checkpoint=checkpoint)
        on_step(0, 1)
        return [out / "00000.png"]

    monkeypatch.setattr(sample, "sample_to_files", draw)
    words = sample_command(recipe, "a cat")
    assert words == [".venv/bin/sd3", "sample", "'a cat'", "--run", "photos-1"]
    code, _, err = sd3("sample", "a cat", "--run", "photos-1")
    assert (code, err) == (0, "")
    expected = (of_store(recipe, store), store.uri(last), 7.0, recipe.finetune[-1].shift)
    assert tuple(asked[name] for name in ("recipe", "checkpoint", "guidance_scale", "shift")) == expected
    for shift, drawn_with in (("2.5", 2.5), ("null", recipe.finetune[-1].shift)):
        sd3("sample", "a cat", "--run", "photos-1", "--set", f"evaluate.shift={shift}")
        assert asked["shift"] == drawn_with
    assert sample_command(load_recipe("mini")) == [".venv/bin/sd3", "sample", "'a red circle left of a blue square'"]
    on_s3 = sample_command(load_recipe("mini", ["store=s3://b/a b"]), "x")
    assert on_s3 == [".venv/bin/sd3", "sample", "x", "--set", "'store=\"s3://b/a b\"'"]
    # other checkpoints, or other pictures of them
    for settings in (
        ["pretrain.samples=9600"],
        ["evaluate.guidance_scale=3"],
    ):
        assert sample_command(load_recipe("mini", settings), "x") == [".venv/bin/sd3", "sample", "x", "--run", "mini"]
    of_a_file = load_recipe("tiny-test", ["name=mine", "run=mini"])
    assert sample_command(of_a_file, "x") == [".venv/bin/sd3", "sample", "x", "--run", "mini"]
    assert "name the one or the other" in sd3("sample", "x", "--run", "photos-1", "--checkpoint", "/x")[2]
    assert read_checkpoint_done(store, last).recipe == recipe.model_dump(mode="json")
