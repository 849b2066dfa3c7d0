from __future__ import annotations

import json
import os
import shlex
from importlib import resources
from types import SimpleNamespace
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import StateType
from rich.console import Console

from flows.cli import demo, terminal
from flows.cli.data_option import folder_overrides
from flows.cli.demo import RunFailed, sample_command
from flows.cli.terminal import RunView, StageView
from flows.local import runs
from flows.local.processes import Process
from flows.local.recipes import find_recipe
from flows.local.runs import GONE
from flows.local.services import ServiceError, Services
from flows.session import RunBusyError, run_lock
from flows.ui import previews
from sd3core.data.sources.photograph_files import put_photographs
from sd3core.data.store import open_store
from sd3core.errors import DataError, RecipeError, StoreError
from sd3core.recipe_file import load_recipe


def on_folder(name, folder):
    return load_recipe(name, folder_overrides(load_recipe(name), folder))


def test_a_users_folder_becomes_a_recipe_of_its_own(tmp_path):
    folder = tmp_path / 'My Photos, 2026 [raw] "x": ü'
    folder.mkdir()
    recipe = on_folder("tiny-test", folder)
    assert (recipe.data.source, recipe.data.folder) == ("folder", str(folder))
    assert recipe.data.name == recipe.towers.name == recipe.run
    assert recipe.run.startswith("my-photos-2026-raw-x-")
    assert recipe.caption.captioner == "none"  # the drawn world's captioner reads drawn scenes only
    assert recipe.pretrain == load_recipe("tiny-test").pretrain
    # what people write is longer than the drawn world's
    assert (recipe.text.clip_tokens, recipe.text.t5_tokens) == (
        32,
        32,
    )
    assert not [
        override for override in folder_overrides(load_recipe("sd3-2b"), folder) if override.startswith("text.")
    ]


def test_folders_of_one_name_do_not_meet(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "photos").mkdir(parents=True)
    runs = {on_folder("tiny-test", tmp_path / parent / "photos").run for parent in "ab"}
    assert len(runs) == 2
    # one folder, however it is written
    assert on_folder("tiny-test", tmp_path / "b" / ".." / "a" / "photos").run in runs


@pytest.mark.parametrize("name", ["...", "写真", "2026", "x" * 200, "a_b.c"])
def test_any_name_of_a_folder_gives_a_valid_one(tmp_path, name):
    (tmp_path / name).mkdir()
    assert on_folder("tiny-test", tmp_path / name).run


def test_a_captioner_for_real_images_stays(tmp_path):
    recipe = load_recipe("tiny-test", ["caption.captioner=vision_language_model", "caption.model=/models/x"])
    assert not [override for override in folder_overrides(recipe, tmp_path) if override.startswith("caption.")]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"^DATA \(--data\) {tmp_path}/none: no such folder$"):
        folder_overrides(load_recipe("tiny-test"), tmp_path / "none")


@pytest.mark.parametrize(
    ("worker", "said"),
    [(True, "towers: vae: No space left on device"), (False, "the Prefect worker has ended, and the run with it")],
)
def test_what_a_run_failed_of(monkeypatch, worker, said):
    """Prefect's own words for the second: `Execution was aborted by Python system exit call.`"""
    monkeypatch.setattr(demo, "worker_lives", lambda: worker)
    stages = [StageView("ingest", "done", 1, ""), StageView("towers", "failed", 1, "vae: No space left on device")]
    assert demo._first_failure(RunView(StateType.FAILED, "", stages)) == said


def test_a_process_that_is_gone_is_told_without_the_uis_advice(monkeypatch):
    monkeypatch.setattr(demo, "worker_lives", lambda: True)
    stages = [StageView("pretrain", "crashed", 1, GONE)]
    assert demo._first_failure(RunView(StateType.CRASHED, "", stages)) == "pretrain: its process is gone"


def test_a_training_phase_is_named_once(monkeypatch):
    monkeypatch.setattr(demo, "worker_lives", lambda: True)
    stages = [StageView("pretrain", "failed", 1, "pretrain: Ray Train's own process died")]
    assert demo._first_failure(RunView(StateType.FAILED, "", stages)) == "pretrain: Ray Train's own process died"


@pytest.mark.parametrize(
    ("captions", "prompt"),
    [
        (["", "a  cat\non a mat"], "a cat on a mat"),
        ([""], demo.EXAMPLE_PROMPT),
        (["猫" * 200], "猫" * demo.PROMPT_CHARS),
    ],
)
def test_a_users_own_caption_is_the_prompt(monkeypatch, tmp_path, captions, prompt):
    shown = [SimpleNamespace(caption=caption) for caption in captions]
    monkeypatch.setattr(previews, "preview_captions", lambda upstream, key: shown)
    assert demo._example_prompt(on_folder("tiny-test", tmp_path), None) == prompt
    assert demo._example_prompt(load_recipe("tiny-test"), None) == demo.EXAMPLE_PROMPT


def test_a_run_that_does_not_start_in_time_is_one_line(monkeypatch, tmp_path):
    prefect = tmp_path / "python"
    prefect.write_text("#!/bin/sh\nexec sleep 60\n")
    prefect.chmod(0o700)
    monkeypatch.setattr(demo.sys, "executable", str(prefect))
    monkeypatch.setattr(demo, "START_SECONDS", 0.5)
    with pytest.raises(
        ServiceError, match="^`prefect deployment run pipeline/mini` did not end within 0.5 s; the same command"
    ):
        demo.start_run("pipeline/mini", {}, Console(quiet=True))


def test_a_stage_is_not_made_again_while_something_works_on_the_run(monkeypatch, tmp_path):
    """A stage's own deployment may: its checkpoints would be gone when it next looks for them."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "start_services", lambda say: Services(port=1))
    monkeypatch.setattr(demo, "_run_at_work", lambda *_: None)
    recipe = load_recipe("tiny-test")
    store = demo.run_store(recipe)
    done = f"runs/{recipe.run}/checkpoints/pretrain/aaaa/000000000096/DONE.json"
    store.put(done, b"{}")
    with run_lock(store.url, recipe.run), pytest.raises(RunBusyError, match="^run tiny-test: process "):
        demo.run_demo("tiny-test", None, [], Console(quiet=True), "pretrain")
    assert store.exists(done)


@pytest.fixture
def at_work(monkeypatch, tmp_path):
    """Makes one run of another recipe file and settings be at work, as its process wrote it down."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))

    def begin(path, overrides=(), began=True):
        run = SimpleNamespace(
            id=uuid4(),
            name="pipeline mine",
            flow_id=uuid4(),
            parameters={"recipe": str(path), "overrides": list(overrides)},
        )
        if began:
            runs.remember_process(
                str(run.id), Process.of(os.getpid()), runs.Reads.of(load_recipe(str(path), list(overrides)))
            )
        monkeypatch.setattr(runs, "unfinished_runs", lambda: [run])
        monkeypatch.setattr(runs, "flow_name", lambda flow_id: "pipeline")
        return run.id

    return begin


def recipe_file(path, **changes):
    fields = yaml.safe_load((resources.files("infra") / "recipes" / "tiny-test.yaml").read_text()) | {
        "name": "mine",
        "run": "mine",
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(fields | changes))
    return path


@pytest.mark.parametrize("began", [True, False])
def test_a_run_is_joined_by_what_it_reads(at_work, tmp_path, began):
    one = recipe_file(tmp_path / "one" / "mine.yaml")
    run_id = at_work(one, ["pretrain.samples=8"], began)
    assert demo._run_at_work(load_recipe(str(one), ["pretrain.samples=8"])) == run_id
    written_otherwise = load_recipe(str(recipe_file(tmp_path / "two" / "mine.yaml")), ["seed=0", "pretrain.samples=8"])
    assert demo._run_at_work(written_otherwise) == run_id
    with pytest.raises(
        RunFailed, match="^run mine: flow run pipeline mine works on it with other settings .* ends it$"
    ):
        demo._run_at_work(load_recipe(str(one)))
    assert demo._run_at_work(load_recipe(str(one), ["run=another"])) is None
    assert demo._run_at_work(load_recipe(str(one), [f"store={tmp_path}/another"])) is None


def test_two_files_with_one_name_and_an_edited_file_are_told_apart(at_work, tmp_path):
    one = recipe_file(tmp_path / "one" / "mine.yaml")
    run_id = at_work(one)
    other = recipe_file(tmp_path / "two" / "mine.yaml", seed=1)
    with pytest.raises(RunFailed, match="works on it with other settings"):
        demo._run_at_work(load_recipe(str(other)))
    assert demo._run_at_work(load_recipe(str(one))) == run_id
    recipe_file(one, seed=2)
    with pytest.raises(RunFailed, match=f"recipe {one} as it was when that run began"):
        demo._run_at_work(load_recipe(str(one)))


def test_a_run_reads_the_file_that_the_command_names(monkeypatch, tmp_path):
    """Also where another file of the same name was added after this command had written the deployments."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    one, two = (
        recipe_file(tmp_path / folder / "mine.yaml", run=run) for folder, run in (("one", "one"), ("zwei ü", "two"))
    )
    asked = []

    def end(run, recipe, deployment, parameters, *_):
        asked.append((deployment, parameters))
        return RunView(StateType.FAILED, "x", [])

    monkeypatch.setattr(demo, "start_services", lambda say: find_recipe(str(two)) and Services(port=1))
    monkeypatch.setattr(demo, "_run_at_work", lambda *_: None)
    monkeypatch.setattr(demo, "_run_to_the_end", end)
    monkeypatch.setattr(demo, "_first_failure", lambda view: "x")
    for recipe in (str(one), "mine", "tiny-test"):  # by name it is the file that was added last
        with pytest.raises(RunFailed):
            demo.run_demo(recipe, None, ["seed=1"] if recipe == "mine" else [], Console(quiet=True))
    mine = "pipeline/mine"
    assert asked == [
        (mine, {"recipe": str(one)}),
        (mine, {"recipe": str(two), "overrides": ["seed=1"]}),
        ("pipeline/tiny-test", {}),
    ]


def test_a_run_is_started_with_its_parameters(monkeypatch, tmp_path):
    run, python = uuid4(), tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {tmp_path}/asked\necho {run}\n")
    python.chmod(0o700)
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    monkeypatch.setattr(demo.sys, "executable", str(python))
    parameters = {"recipe": "/zwei ü/mine.yaml", "overrides": ["seed=1"]}
    assert demo.start_run("pipeline/mine", parameters, Console(quiet=True)) == run
    asked = (tmp_path / "asked").read_text().splitlines()
    given = [word.partition("=") for at, word in enumerate(asked) if asked[at - 1] == "--param"]
    assert {name: json.loads(value) for name, _, value in given} == parameters


@pytest.mark.parametrize("joined", [False, True])
def test_a_run_whose_process_read_another_recipe_is_not_taken_for_this_commands(at_work, monkeypatch, tmp_path, joined):
    """The file was edited between the command's look at it and the process's; what the command started is ended."""
    path = recipe_file(tmp_path / "one" / "mine.yaml")
    as_it_was = load_recipe(str(path))
    recipe_file(path, seed=2)
    run, ended = at_work(path), []
    monkeypatch.setattr(demo, "start_run", lambda *_: run)
    monkeypatch.setattr(runs, "cancel_run", lambda run, reason: ended.append(run))
    with pytest.raises(
        RunFailed, match="^run mine: its process read another recipe than this command.* its file was edited meanwhile"
    ):
        demo._run_to_the_end(
            run if joined else None, as_it_was, "pipeline/mine", {}, Services(port=1), Console(quiet=True)
        )
    assert ended == ([] if joined else [run])


def test_a_run_that_reads_what_the_command_read_is_followed(at_work, monkeypatch, tmp_path):
    """Whatever the path: in another checkout it is another one."""
    run = at_work(recipe_file(tmp_path / "two" / "mine.yaml"))
    monkeypatch.setattr(terminal, "fail_dead_runs", list)
    monkeypatch.setattr(terminal, "newest_picture", lambda run: None)
    monkeypatch.setattr(terminal, "view_run", lambda run: RunView(StateType.COMPLETED, "", []))
    recipe = load_recipe(str(recipe_file(tmp_path / "one" / "mine.yaml")))
    view = demo._run_to_the_end(run, recipe, "pipeline/mine", {}, Services(port=1), Console(quiet=True))
    assert view.finished


def test_what_can_be_told_before_services_start_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "start_services", lambda say: pytest.fail("services were started"))
    with pytest.raises(RecipeError, match="^--from-stage 'pretrian': did you mean 'pretrain'"):
        demo.run_demo("tiny-test", None, [], Console(quiet=True), "pretrian")
    (tmp_path / "file").touch()
    for store in ("/proc/none", f"{tmp_path}/file/store", f"file://{tmp_path}/file"):
        with pytest.raises(StoreError, match="cannot be written: "):
            demo.run_demo("tiny-test", None, [f"store={store}"], Console(quiet=True))


def test_the_sample_command_can_be_pasted():
    recipe = load_recipe("tiny-test", ["run=x", "store='/a b/$c'"])
    words = shlex.split(" ".join(sample_command(recipe, "it's a $cat")))
    assert words == [".venv/bin/sd3", "sample", "it's a $cat", "--run", "x", "--set", 'store="/a b/$c"']


@pytest.mark.parametrize(
    "name",
    [
        "😀 photos",
        "𠮷野家",
        "a%20b#?",
        "tab\tand\nnewline",
        "\x1b[2J\x9b",
        "a: b, [c] {d} 'e' \"f\" \\",
        "\u2028\ufeff",
    ],
)
def test_a_folder_of_any_name_is_the_recipes_folder(tmp_path, name):
    (tmp_path / name).mkdir()
    assert on_folder("tiny-test", tmp_path / name).data.folder == str(tmp_path / name)


def test_a_folder_whose_name_is_no_text_is_named(tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    with pytest.raises(DataError, match=r"/\\xff: its name is not UTF-8, and recipes are; rename it$"):
        folder_overrides(load_recipe("tiny-test"), folder)


def test_tars_and_parquet_files_are_taken_from_a_folder_or_a_bucket(tmp_path, s3_bucket):
    for form, source in (("tars", "webdataset"), ("parquet", "parquet")):
        for url in (str(tmp_path / form), f"s3://{s3_bucket}/My {form}/"):
            put_photographs(open_store(url.rstrip("/")), form)
            recipe = on_folder("tiny-test", url)
            assert (recipe.data.source, recipe.data.urls, recipe.data.folder) == (source, (url,), None)
            assert recipe.run.rpartition("-")[0] == (f"my-{form}" if url.startswith("s3") else form)
            assert recipe.caption.captioner == "none" and recipe.run == recipe.data.name == recipe.towers.name
    with pytest.raises(
        DataError, match=r"^DATA \(--data\) s3://.*: no \.tar or \.parquet below it; images by themselves"
    ):
        on_folder("tiny-test", f"s3://{s3_bucket}/nothing")
    with pytest.raises(DataError, match=r"^DATA \(--data\) https://x/y: a URL that is not read \(s3:// is\)"):
        on_folder("tiny-test", "https://x/y")
    put_photographs(open_store(str(tmp_path / "tars")), "folder")
    assert on_folder("tiny-test", tmp_path / "tars").data.source == "folder"  # images go before tars beside them
