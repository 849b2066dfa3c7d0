"""How a stage's run ends: what it tells, shows and hands to the pipeline."""

from __future__ import annotations

import logging

import pytest

import flows.stage
from flows.stage import StageRun
from sd3core.data.store import open_store
from sd3core.recipe_file import load_recipe
from sd3core.specs import fingerprint
from workers.stage import StageResult, join_results
from workers.trainer.stage import join_phases


class Reporter:
    """A stage's reporter that only remembers."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.reason = ""

    def warn(self, message: str) -> None:
        self.told.append(message)

    def skipped(self, reason: str) -> None:
        self.reason = reason


@pytest.fixture
def run(tmp_path, monkeypatch):
    published = []
    monkeypatch.setattr(flows.stage, "publish", lambda *shown: published.append(shown))
    run = StageRun("encode", load_recipe("tiny-test"), open_store(str(tmp_path)), Reporter(), logging.getLogger("run"))
    run.published = published
    return run


def part(stage: str, digest: str, skipped: bool, reason: str, **said: list[str]) -> StageResult:
    return StageResult(
        stage, f"datasets/d/{stage}/MANIFEST.{digest}.json", digest, skipped, reason, 1.0, made=2, **said
    )


def test_what_was_not_told_is_told_and_the_pipeline_hears_all(run, caplog):
    run.warn("a")
    result = part("text", "1", False, "first run", warnings=["a", "b"], notes=["a", "c", "c"])
    with caplog.at_level(logging.WARNING, "run"):
        outcome = run.finish(result, [[{"what": "text"}]], {"picture": b""})
    assert run.report.told == ["a", "b"] and [record.message for record in caplog.records] == ["c"]
    assert outcome == {
        "name": "encode",
        "manifest": run.store.uri("datasets/d/text/MANIFEST.1.json"),
        "digest": "1",
        "seconds": outcome["seconds"],
        "state": "done",
        "reason": "first run",
        "warnings": ["a", "b", "a", "c", "c"],
    }
    title, said = "encode: done (first run)", outcome["warnings"]
    assert run.published == [("encode", title, [[{"what": "text"}]], said, {"picture": b""})]


def test_a_stage_is_skipped_where_all_of_its_parts_are(run):
    parts = [part("text", "1", True, "finished before"), part("latents.pretrain", "2", True, "finished before")]
    result = join_results("encode", {each.stage: each for each in parts}, "12", "finished before")
    assert run.finish(result)["state"] == "skipped" and run.report.reason == "finished before"
    assert (result.path, result.made, result.folder) == (parts[1].path, 4, "datasets/d/latents.pretrain")
    parts[0] = part("text", "1", False, "first run")
    assert run.finish(join_results("encode", {each.stage: each for each in parts}, "12", ""))["state"] == "done"


def test_phases_are_told_each_with_its_own_reason():
    first, second = part("finetune.0", "1", True, "done"), part("finetune.1", "2", False, "longer", notes=["n"])
    alone, both = join_phases([first]), join_phases([first, second])
    assert (alone.reason, alone.skipped, alone.path, alone.digest) == ("done", True, first.path, "1")
    assert (both.reason, both.skipped, both.path) == ("finetune.1: longer", False, second.path)
    assert (both.digest, both.notes) == (fingerprint(["1", "2"]), ["n"])


def test_latents_that_were_made_for_a_phase_are_work_of_its_stage():
    phase = part("finetune.0", "1", True, "done")
    stood, made = (part("latents.finetune.0", "2", skipped, "why") for skipped in (True, False))
    found = join_phases([phase], [stood])
    assert (found.reason, found.skipped, found.digest, found.path) == ("done", True, "1", phase.path)
    found = join_phases([phase], [made])
    assert (found.reason, found.skipped, found.digest, found.path) == (
        "latents.finetune.0: why",
        False,
        "1",
        phase.path,
    )
