"""The upgrade guard on what the version before left of a run of tiny-test: which formats rise, what is asked, what never is.

tests/_written_before/tiny-test-records.json holds that store's manifests, done records, notes and scores as they were written.
"""

from __future__ import annotations

import importlib
import inspect
import io
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from rich.console import Console

import flows.stage
from flows import pipeline, upgrade
from flows.local.deployments import FLOWS, PARAMETERS
from flows.redo import forget_from
from flows.standing import standing_parts
from flows.upgrade import RemakeNeeded, check_upgrade, print_upgrade
from flows.upstream import Upstream
from sd3core import specs
from sd3core.checkpoint_record import read_checkpoint_done
from sd3core.data.manifest import read_manifest
from sd3core.data.store import FileStore
from sd3core.recipe_file import load_recipe
from workers.stage import remember_stage

DATA = ["ingest", "towers", "caption", "text", "latents.pretrain", "latents.finetune.0"]
RESULTS = ["pretrain", "finetune.0", "evaluate", "export"]
ORDER = [*DATA[:-1], "pretrain", DATA[-1], *RESULTS[1:]]  # in which a run makes them
FOLLOW = {  # what is made again where one format rises, by the parts' own word
    "raw": [*DATA, *RESULTS],
    "towers": ["towers", "text", "latents.pretrain", "latents.finetune.0", *RESULTS],
    "captions": ["caption", "text", *RESULTS],
    "text": ["text", *RESULTS],
    "latents": ["latents.pretrain", "latents.finetune.0", *RESULTS],
    "train": RESULTS,
    "evaluations": ["evaluate"],
}


class NoShardsListed(FileStore):
    """A store whose shards are too many to be listed for a question."""

    def list(self, prefix: str = ""):
        assert not prefix.startswith(("datasets", "towers")), prefix
        return super().list(prefix)


@pytest.fixture
def store(tmp_path, write_records):
    store = NoShardsListed(tmp_path / "store")
    write_records(store)
    return store


def recipe(*overrides: str):
    return load_recipe("tiny-test", list(overrides))


def parts_of(recipe, store, status="upgrade"):
    return [part.name for part in standing_parts(recipe, store) if part.status == status]


def test_what_the_version_before_made_of_data_stands_under_todays_formats_up_to_encoding(store):
    assert parts_of(recipe(), store, "stands") == ["ingest", "towers", "caption"]


@pytest.mark.parametrize("kind", FOLLOW)
def test_a_format_that_rose_is_named_with_all_that_follows_and_nothing_else(store, rise, kind):
    rise(kind, "train")  # the fields of a phase of today are not those of then, so of training nothing stands
    expected = [part for part in ORDER if part in {*FOLLOW[kind], *RESULTS}]
    assert parts_of(recipe(), store) == expected
    changes = [change for part in standing_parts(recipe(), store) for change in part.changes]
    assert {change.split()[0] for change in changes} == {kind, "train"}
    with pytest.raises(RemakeNeeded) as stopped:
        check_upgrade(recipe(), store, remake=False)
    said = str(stopped.value)
    assert "\n" not in said and "--remake" in said and "remake=true" in said and "train format 1 -> 6" in said
    stays = [part for part in DATA if part not in expected]
    assert f"this stays: {', '.join(stays) or 'nothing else'};" in said


def test_scores_alone(store, rise):
    rise("evaluations", "train")
    part = next(part for part in standing_parts(recipe(), store) if part.name == "evaluate")
    assert part.changes == ("evaluations format 2 -> 7",)


def test_the_small_world_is_a_version_too(store, rise, monkeypatch):
    monkeypatch.setattr(specs, "WORLD", specs.WORLD + 1)
    parts = standing_parts(recipe(), store)
    assert parts[0].changes == ("raw world 2 -> 3",)
    assert [part.name for part in parts if part.status == "upgrade"] == DATA


def test_the_word_is_kept_for_the_run_and_for_those_formats_only(store, rise):
    rise("captions", "train")
    check_upgrade(recipe(), store, remake=True)
    check_upgrade(recipe(), store, remake=False)  # as after a kill half-way
    with pytest.raises(RemakeNeeded):
        check_upgrade(recipe("run=another"), store, remake=False)
    rise("captions", "text", "train")
    with pytest.raises(RemakeNeeded, match="text format 1 -> 6"):
        check_upgrade(recipe(), store, remake=False)


@pytest.mark.parametrize(
    "override",
    ["data.held_out_fraction=0.3", "data.name=other", "towers.name=other", "seed=1", "data.aspect_ratios=[1.0]"],
)
def test_a_users_change_of_the_data_is_never_asked_about(store, rise, override):
    rise("raw", "towers", "captions", "text", "latents", "train")
    asked = parts_of(recipe(override), store)
    assert asked == ([] if override.startswith(("data", "seed")) else ["ingest", "caption"])


def test_a_users_change_of_training_is_never_asked_about(store, rise):
    rise("train")
    for override in ("pretrain.learning_rate=0.01", "model.depth=2", "text.null=empty"):
        assert parts_of(recipe(override), store) == []
        check_upgrade(recipe(override), store, remake=False)
    assert parts_of(recipe("finetune.0.learning_rate=0.01"), store) == ["pretrain"]


def test_first_runs_are_never_asked(tmp_path, rise):
    store = NoShardsListed(tmp_path / "empty")
    rise("raw", "train")
    check_upgrade(recipe(), store, remake=False)
    assert not store.exists("runs/tiny-test/remake.json")


def test_another_run_of_the_same_data_asks_for_the_data_alone(store, rise):
    rise("raw", "train")
    assert parts_of(recipe("run=another"), store) == DATA
    assert parts_of(recipe("run=another", "pretrain.samples=960"), store) == DATA


def test_a_phase_that_did_not_come_to_its_end_is_not_begun_again_unasked(store, rise):
    rise("train")
    for note in ("pretrain", "finetune.0"):
        store.delete(f"runs/tiny-test/stages/{note}.json")
    folder = next(entry.path for entry in store.list("runs/tiny-test/checkpoints/pretrain")).rpartition("/")[0]
    assert folder.endswith("000000000032")
    part = next(part for part in standing_parts(recipe(), store) if part.name == "pretrain")
    assert part.changes == ("train format older -> 6",)
    assert parts_of(recipe("pretrain.learning_rate=0.01"), store) == []


def test_what_was_allowed_is_allowed_when_only_the_newer_half_says_its_number(store, rise, finish_checkpoint):
    """Pretraining has been made again: its note is of the new one, so nothing says by which format the older one was made."""
    rise("train")
    check_upgrade(recipe(), store, remake=True)
    first, own = recipe().phases()[0]
    fields = Upstream(recipe(), store).phase_inputs(first).fields
    folder = specs.checkpoints_folder(recipe(), first, fields)
    finish_checkpoint(store, f"{folder}/{own.last_samples:012d}", recipe())
    digest = read_checkpoint_done(store, f"{folder}/{own.last_samples:012d}").digest
    remember_stage(store, "tiny-test", first, folder, digest, fields)
    told = [change for part in standing_parts(recipe(), store) for change in part.changes]
    assert "train format older -> 6" in told
    check_upgrade(recipe(), store, remake=False)
    rise("text", "train")
    with pytest.raises(RemakeNeeded):
        check_upgrade(recipe(), store, remake=False)


def test_stages_that_are_made_again_by_wish_are_not_asked_about_and_those_before_are(store, rise):
    rise("train")
    check_upgrade(recipe(), store, remake=False, from_stage="pretrain")
    check_upgrade(recipe(), store, remake=False, up_to="encode")
    rise("text", "train")
    with pytest.raises(RemakeNeeded):
        check_upgrade(recipe(), store, remake=False, from_stage="pretrain")


def test_the_plan_says_what_stays_and_what_it_costs(store, rise):
    rise("latents", "train")
    out = io.StringIO()
    print_upgrade(recipe(), store, Console(file=out, width=200))
    rows = {line.split()[0]: line for line in out.getvalue().splitlines() if line.strip()}
    assert "stays" in rows["text"] and "made again: latents format 1 -> 6" in rows["latents.pretrain"]
    part = next(part for part in standing_parts(recipe(), store) if part.name == "latents.pretrain")
    standing = next(fol for fol in part.folders)
    assert upgrade.remaking(recipe(), store, part, {}).bytes == sum(read_manifest(store, f).bytes for f in part.folders)
    assert standing.startswith("datasets/tiny-world/latents/")
    rise()
    quiet = io.StringIO()
    print_upgrade(recipe("run=fresh"), store, Console(file=quiet))
    assert quiet.getvalue() == ""


def test_every_deployment_takes_the_parameter():
    for name in FLOWS:
        flow = getattr(importlib.import_module(f"flows.{name}"), name)
        assert tuple(inspect.signature(flow.fn).parameters) == PARAMETERS


def test_of_the_version_before_all_from_encoding_on_is_made_again(store):
    """This very upgrade: rows that are read by range need digests of their own, and are trained on in another order."""
    parts = {part.name: part for part in standing_parts(recipe(), store)}
    assert parts["text"].changes == ("text format 1 -> 2",)
    assert parts["latents.pretrain"].changes == parts["latents.finetune.0"].changes == ("latents format 1 -> 2",)
    assert parts["pretrain"].changes == parts["finetune.0"].changes == ("train format 1 -> 3",)
    assert [part.status for part in parts.values()][3:] == ["upgrade"] * (3 + len(RESULTS))
    asked = parts_of(recipe("pretrain.learning_rate=0.01"), store)
    assert asked == ["text", "latents.pretrain", "latents.finetune.0"]


def test_what_is_damaged_is_left_to_the_stage_that_mends_it(store, rise):
    folder = specs.towers_folder(recipe())
    store.put(f"{folder}/MANIFEST.json", b"{")
    check_upgrade(recipe(), store, remake=False)
    assert [part.status for part in standing_parts(recipe(), store)][:3] == ["stands", "other", "stands"]


@pytest.mark.parametrize("first", ["ingest", "encode", "pretrain"])
def test_what_the_user_has_made_again_from_a_stage_on_is_asked_of_no_more_and_what_stood_stays(store, rise, first):
    rise("raw", "text", "train")
    plain, done = FileStore(store.root), sorted(store.root.rglob("DONE.json"))
    if first != "ingest":
        with pytest.raises(RemakeNeeded):
            check_upgrade(recipe(), store, remake=False, from_stage=first)
        assert not store.exists("runs/tiny-test/remake.json")
    check_upgrade(recipe(), store, remake=first != "ingest", from_stage=first)
    before = {entry.path for entry in plain.list()}
    forget_from(recipe(), plain, first)
    assert before == {entry.path for entry in plain.list()} | {"runs/tiny-test/evaluations/scores.json"}
    assert sorted(store.root.rglob("DONE.json")) == done
    check_upgrade(recipe(), store, remake=False)  # as the pipeline that follows asks
    rise("raw", "text", "train", "latents")
    with pytest.raises(RemakeNeeded, match="latents format 1 -> 6"):
        check_upgrade(recipe(), store, remake=False)


def test_a_rise_that_shows_when_a_stage_has_been_made_again_is_part_of_the_wish(store, rise):
    """Without its data nothing is known of training; the same data made again, the version before's stands."""
    rise("train")
    plain = FileStore(store.root)
    check_upgrade(recipe(), store, remake=False, from_stage="encode")
    manifests = {path: path.read_bytes() for path in store.root.rglob("MANIFEST.json")}
    forget_from(recipe(), plain, "encode")
    assert parts_of(recipe(), store) == []
    check_upgrade(recipe(), store, remake=False)
    for path, data in manifests.items():
        path.write_bytes(data)
    assert "pretrain" in parts_of(recipe(), store)
    check_upgrade(recipe(), store, remake=False)


def test_a_plan_on_a_machine_without_the_captioner_is_a_plan(store, rise):
    out = io.StringIO()
    print_upgrade(recipe("caption.captioner=vision_language_model", "caption.model=/no/such"), store, Console(file=out))
    assert out.getvalue() == ""


@pytest.mark.parametrize("alone", [True, False])
def test_a_stage_asks_by_itself_and_leaves_it_to_its_pipeline_inside_one(monkeypatch, alone):
    asked = []

    @contextmanager
    def opened(*_):
        yield SimpleNamespace(recipe="recipe", store="store")

    monkeypatch.setattr(flows.stage, "session", opened)
    monkeypatch.setattr(flows.stage, "StageReporter", opened)
    monkeypatch.setattr(flows.stage, "get_run_logger", lambda: None)
    monkeypatch.setattr(flows.stage, "in_session", lambda: not alone)
    monkeypatch.setattr(flows.stage, "check_upgrade", lambda *asked_for, up_to: asked.append((*asked_for, up_to)))
    with flows.stage.stage("encode", "tiny-test", None, True):
        assert asked == [("recipe", "store", True, "encode")] * alone


def test_a_pipeline_asks_first_and_after_each_stage_that_made_something(monkeypatch, store):
    said = []

    @contextmanager
    def opened(*_):
        yield SimpleNamespace(recipe=recipe(), store=store)

    def stage_flow(name, state):
        return lambda *_: said.append(name) or {"state": state}

    for name in ("check_room", "check_start_from", "check_vae"):
        monkeypatch.setattr(pipeline.Upstream, name, lambda *_: None)
    monkeypatch.setattr(pipeline, "living_nodes", lambda: None)
    monkeypatch.setattr(pipeline, "session", opened)
    monkeypatch.setattr(pipeline, "get_run_logger", lambda: SimpleNamespace(warning=lambda line: None))
    monkeypatch.setattr(pipeline, "check_upgrade", lambda *_: said.append("asked"))
    monkeypatch.setattr(
        pipeline, "STAGE_FLOWS", (stage_flow("a", "done"), stage_flow("b", "skipped"), stage_flow("c", "done"))
    )
    monkeypatch.setattr(pipeline, "write_summary", lambda store, recipe, outcomes, *_: outcomes)
    assert len(pipeline.pipeline.fn("tiny-test")) == 3
    assert said == ["asked", "a", "asked", "b", "c"]
