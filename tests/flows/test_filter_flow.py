"""The filter's flow, what stages after it find of it, and taking it back."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from counting_models import DIGESTS, TOWERS, count_models
from in_process import without_ray

import workers.filter
from flows import filter as filter_flow
from flows import pipeline
from flows.redo import forget_from
from flows.standing import standing_parts
from flows.upstream import NotFinishedError, Upstream
from sd3core import specs
from sd3core.data.manifest import read_manifest
from sd3core.data.split_rows import read_rows
from sd3core.data.store import open_store
from sd3core.data.unused import find_unused
from sd3core.errors import DataError
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.evaluate_tasks import EvaluationInputs, ScoredCheckpoint, plan_tasks
from workers.ingest import ingest_stage
from workers.stage import recall_stage

FILTERED = ["data.images=48", "data.rows_per_shard=8", "filter.duplicates={threshold: 0.9}", "filter.max_aspect=0.9"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    count_models(monkeypatch, tmp_path)
    without_ray(monkeypatch, workers.filter)
    monkeypatch.setattr(Upstream, "towers_manifest", SimpleNamespace(digests=DIGESTS, folder="towers", digest="0" * 64))
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def call(store, monkeypatch):
    """Runs the flow without Prefect; what it showed."""

    def run(recipe: Recipe) -> SimpleNamespace:
        shown = SimpleNamespace()

        def finish(result, tables=(), pictures=None):
            shown.result, shown.tables, shown.pictures = result, tables, pictures

        @contextmanager
        def stage(*_):
            yield SimpleNamespace(
                recipe=recipe, store=store, report=ignore_progress, upstream=Upstream(recipe, store), finish=finish,
                warn=print, log=logging.getLogger(),
            )  # fmt: skip

        monkeypatch.setattr(filter_flow, "stage", stage)
        filter_flow.filter.fn("tiny-test")
        return shown

    return run


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny-test", [*FILTERED, *overrides])


def test_the_page_has_funnel_rules_and_pictures_and_a_second_run_has_nothing_to_do(store, call):
    ingest_stage(recipe(), store, ignore_progress)
    shown = call(recipe())
    funnel, rules = shown.tables
    assert funnel[0] == {"what": "images ingested", "images": "48", "of all": "100.00%"}
    kept = read_manifest(store, specs.keep_folder(recipe())).rows
    assert 0 < kept < 48 and funnel[-1]["images"] == f"{kept}" and len(funnel) > 3
    assert {"rule": "filter.max_aspect", "value": "0.9"} in rules
    assert len(shown.pictures) == len(funnel) - 2
    again = call(recipe())
    assert again.result.skipped and again.pictures == {} and again.tables[0] == funnel
    plain = call(load_recipe("tiny-test", FILTERED[:2]))
    assert plain.result.skipped and plain.result.reason == "the recipe names no filter"


def test_later_stages_wait_for_it_and_for_what_it_keeps_today(store, call):
    raw = ingest_stage(recipe(), store, ignore_progress).manifest
    with pytest.raises(NotFinishedError, match="^filter is not finished .*'filter/tiny-test'"):
        _ = Upstream(recipe(), store).keep
    call(recipe())
    keep = Upstream(recipe(), store).keep
    caption_stage(recipe(), store, raw, ignore_progress, keep)
    assert Upstream(recipe(), store).captions is not None
    looser = recipe("filter.max_aspect=2")
    call(looser)
    with pytest.raises(DataError, match="^caption: what it made is older than keep"):
        _ = Upstream(looser, store).captions
    with pytest.raises(DataError, match="^caption: what it made is older than keep"):  # nor does it do without a filter
        _ = Upstream(load_recipe("tiny-test", FILTERED[:2]), store).captions
    more = recipe("data.images=56")
    ingest_stage(more, store, ignore_progress)
    with pytest.raises(DataError, match="^filter: what it made is older than raw"):
        _ = Upstream(more, store).keep


def test_it_is_taken_back_by_its_name_with_what_it_measured_and_found(store, call):
    ingest_stage(recipe(), store, ignore_progress)
    call(recipe())
    parts = {part.name: part.status for part in standing_parts(recipe(), store, "caption")}
    assert parts["measures"] == parts["filter"] == "stands" and list(parts)[2:] == ["measures", "filter", "caption"]
    assert "filter" not in {part.name for part in standing_parts(load_recipe("tiny-test", FILTERED[:2]), store)}
    before = {entry.path for entry in store.list("datasets")}
    assert forget_from(recipe(), store, "filter")[0] == "filter"
    gone = before - {entry.path for entry in store.list("datasets")}
    assert {path.split("/")[2] for path in gone} == {"measures", "keep"}
    assert [path for path in gone if specs.DUPLICATES in path and path.endswith(".json")]
    assert not call(recipe()).result.skipped
    assert before == {entry.path for entry in store.list("datasets")}
    forget_from(load_recipe("tiny-test", FILTERED[:2]), store, "filter")  # of a recipe without one there is nothing


def test_what_a_run_uses_is_not_unused(store, call):
    ingest_stage(recipe(), store, ignore_progress)
    call(recipe())
    call(recipe("filter.max_aspect=2"))
    assert [item.name.split("/")[2] for item in find_unused(store, days=-1)] == ["keep"]  # of the other threshold
    assert recall_stage(store, "tiny-test", "measures") is not None


def test_held_out_prompts_and_references_are_of_rows_that_are_kept(store, call):
    ingest_stage(recipe(), store, ignore_progress)
    call(recipe())
    upstream = Upstream(recipe(), store)
    raw = read_manifest(store, upstream.raw.folder, upstream.raw.digest)
    everyone, kept = (read_rows(store, raw, "held_out", 99, **of) for of in ({}, {"kept": upstream.kept}))
    assert 0 < len(kept) < len(everyone) and [row for row in everyone if row in kept] == kept
    plain = EvaluationInputs(
        {"pretrain": [ScoredCheckpoint("a", 8, "d")]}, upstream.raw, TOWERS, {"pretrain": TOWERS}, "towers", DIGESTS
    )
    ruled = EvaluationInputs(**vars(plain) | {"keep": upstream.keep, "kept": upstream.kept.inputs})
    for before, after in zip(plan_tasks(recipe(), plain), plan_tasks(recipe(), ruled), strict=True):
        assert after.protocol["keep"] == upstream.kept.inputs["keep"] and before.place != after.place
        if after.part == "pictures":
            assert after.protocol["reference"]["keep"] == upstream.kept.inputs["keep"]


@pytest.mark.parametrize(
    ("overrides", "called"), [([], ["ingest", "caption"]), (FILTERED, ["ingest", "filter", "caption"])]
)
def test_a_pipeline_calls_it_only_where_the_recipe_names_it(store, monkeypatch, overrides, called):
    said, chosen = [], load_recipe("tiny-test", overrides)
    flow = lambda name: lambda *_: said.append(name) or {"state": "skipped"}

    @contextmanager
    def opened(*_):
        yield SimpleNamespace(recipe=chosen, store=store)

    for name in ("check_room", "check_start_from", "check_vae"):
        monkeypatch.setattr(pipeline.Upstream, name, lambda *_: None)
    own = flow("filter")
    for name, value in {
        "session": opened,
        "filter_rows": own,
        "STAGE_FLOWS": (flow("ingest"), own, flow("caption")),
        "living_nodes": lambda: None,
        "check_upgrade": lambda *_: None,
        "get_run_logger": lambda: SimpleNamespace(warning=print),
        "write_summary": lambda *_: {},
    }.items():
        monkeypatch.setattr(pipeline, name, value)
    store.put_json(specs.scores_path(chosen.run), {})
    pipeline.pipeline.fn("tiny-test")
    assert said == called


def test_the_pipeline_has_a_flow_for_every_stage_in_their_order():
    assert [flow.name for flow in pipeline.STAGE_FLOWS] == list(specs.STAGES)
