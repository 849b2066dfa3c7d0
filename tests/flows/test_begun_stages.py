"""Trainings, evaluations and exports say what they begin, and take it back at their end; a kill between leaves it."""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest

import workers.evaluate
import workers.export
import workers.trainer.stage
from flows import evaluate, export, pipeline, training
from flows.upstream import Upstream
from sd3core.data.begun import all_begun
from sd3core.data.manifest import ManifestRef
from sd3core.data.store import open_store
from sd3core.errors import StoreError
from sd3core.recipe_file import load_recipe
from sd3core.towers.artifact import TOWER_FOLDERS
from workers.stage import recall_stage

START = "s3://bucket/runs/base/checkpoints/pretrain/111111111111/000000000008"
REF = ManifestRef("datasets/d/raw/1", "a" * 64)


class Killed(StoreError):
    pass


@pytest.fixture
def run(tmp_path):
    recipe = load_recipe("tiny-test", [f"model.start_from={START}"])
    return SimpleNamespace(
        recipe=recipe,
        store=open_store(str(tmp_path)),
        report=lambda progress: None,
        warn=print,
        log=logging.getLogger(),
        finish=lambda result, *shown: result,
    )


@pytest.fixture
def in_flow(run, monkeypatch):
    """The body of a stage's flow, without Prefect."""

    @contextmanager
    def stage(*_):
        yield run

    def call(module, function):
        monkeypatch.setattr(module, "stage", stage)
        return function.fn("tiny-test")

    return call


def killed(*_, **__):
    raise Killed("here")


def test_a_training_says_its_folder_and_its_start(run, monkeypatch):
    folder = "runs/tiny-test/checkpoints/pretrain/222222222222"
    job = SimpleNamespace(
        run="tiny-test",
        folder=folder,
        fields={"training": {}, "latents": "a" * 64},
        init=START,
        last_samples=8,
        training=run.recipe.pretrain,
        phase="pretrain",
    )
    run.upstream = SimpleNamespace(images=lambda key: 77)
    monkeypatch.setattr(training, "phase_job", lambda run, key: job)
    monkeypatch.setattr(training, "training_view", lambda run, job: nullcontext())
    monkeypatch.setattr(workers.trainer.stage, "train", killed)
    with pytest.raises(Killed):
        training.train_phase(run, "pretrain")
    (begun,) = all_begun(run.store)
    assert (begun.run, begun.stage, begun.folder) == ("tiny-test", "pretrain", folder)
    assert begun.record["needs"] == [START] and begun.record["fields"] == job.fields


def test_an_export_is_noted_when_it_ends(run, in_flow, monkeypatch):
    ends = False

    def look(store, folder, standing, checked):
        store.put_json(f"{folder}/MANIFEST.json", standing)
        return (True, None) if ends else killed()

    run.upstream = SimpleNamespace(
        last_checkpoint=lambda key: SimpleNamespace(folder="runs/tiny-test/checkpoints/finetune.0/1"),
        facts_of=lambda checkpoint: SimpleNamespace(digest="b" * 64, shift=1.0),
        towers_manifest=SimpleNamespace(folder="towers/t", digests=dict.fromkeys(TOWER_FOLDERS, "d")),
    )
    monkeypatch.setattr(export, "fetch_towers", lambda *_: None)
    monkeypatch.setattr(workers.export, "_look", look)
    with pytest.raises(Killed):
        in_flow(export, export.export)
    (begun,) = all_begun(run.store)
    assert (begun.stage, begun.record["needs"]) == ("export", ["runs/tiny-test/checkpoints/finetune.0/1"])
    assert begun.folder.startswith("runs/tiny-test/export/") and begun.record["fields"]["checkpoint"] == "b" * 64
    ends = True
    assert in_flow(export, export.export).folder == begun.folder
    assert not all_begun(run.store) and recall_stage(run.store, "tiny-test", "export").folder == begun.folder


def test_an_evaluation_says_the_checkpoints_that_it_scores(run, in_flow, monkeypatch):
    ref = SimpleNamespace(folder="runs/tiny-test/checkpoints/pretrain/1/000000000008", samples=8)
    monkeypatch.setattr(Upstream, "checkpoints", lambda *_: [ref])
    monkeypatch.setattr(Upstream, "digest_of", lambda *_: "b" * 64)
    monkeypatch.setattr(Upstream, "towers_manifest", SimpleNamespace(digests={}))
    monkeypatch.setattr(Upstream, "latents", lambda *_: REF)
    monkeypatch.setattr(Upstream, "sizes", lambda *_: None)
    for name in ("raw", "text", "towers"):
        monkeypatch.setattr(Upstream, name, REF)
    run.upstream = Upstream(run.recipe, run.store)
    monkeypatch.setattr(workers.evaluate, "plan_tasks", killed)
    with pytest.raises(Killed):
        in_flow(evaluate, evaluate.evaluate)
    (begun,) = all_begun(run.store)
    assert ref.folder in begun.record["needs"] and f"references/{run.recipe.data.name}" in begun.record["needs"]
    assert begun.record["fields"]["raw"] == "a" * 64


def test_a_pipeline_says_its_start_before_the_first_stage(run, monkeypatch):
    monkeypatch.setattr(pipeline, "session", lambda *_: nullcontext(run))
    for name in ("check_upgrade", "living_nodes", "get_run_logger"):
        monkeypatch.setattr(pipeline, name, lambda *_: logging.getLogger())
    for name in ("check_room", "check_start_from", "check_vae"):
        monkeypatch.setattr(Upstream, name, lambda *_: None)
    monkeypatch.setattr(pipeline, "STAGE_FLOWS", (killed,))
    with pytest.raises(Killed):
        pipeline.pipeline.fn("tiny-test")
    (begun,) = all_begun(run.store)
    assert (begun.stage, begun.folder, begun.record["needs"]) == ("pipeline", "runs/tiny-test", [START])
    run.store.put_json("runs/tiny-test/evaluations/scores.json", {})
    monkeypatch.setattr(pipeline, "STAGE_FLOWS", ())
    monkeypatch.setattr(pipeline, "write_summary", lambda *_: {"run": "tiny-test"})
    assert pipeline.pipeline.fn("tiny-test") == {"run": "tiny-test"} and not all_begun(run.store)
