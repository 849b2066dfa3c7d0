"""What a running stage posts, against a server that only remembers: created once, updated when new, never in the way."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from types import SimpleNamespace
from uuid import UUID, uuid4

import httpx
import pytest

from flows import stage as stage_module
from flows.ui import artifacts
from flows.ui.artifacts import LiveArtifact, StageReporter, artifact_key, markdown_picture, markdown_table
from sd3core.progress import Progress


class Server:
    """Artifacts by id; `away`: it answers nothing."""

    def __init__(self):
        self.posted: dict[UUID, list[tuple[object, str]]] = {}
        self.away = False

    @contextmanager
    def client(self):
        if self.away:
            raise httpx.ConnectError("away")
        yield self

    def create_artifact(self, artifact):
        made = uuid4()
        self.posted[made] = [(artifact.data, artifact.description)]
        return SimpleNamespace(id=made)

    def update_artifact(self, artifact_id, change):
        self.posted[artifact_id].append((change.data, change.description))


@pytest.fixture
def server(monkeypatch):
    made = Server()
    monkeypatch.setattr(artifacts, "prefect_client", made.client)
    return made


def live(look, seconds=0.0):
    return LiveArtifact("finetune.0-loss", "markdown", str(uuid4()), look, seconds)


def test_created_with_the_first_thing_to_show_then_updated_when_it_is_new(server):
    shown = [None, ("a", "1"), ("a", "1"), ("b", "2")]
    artifact = live(lambda: shown.pop(0))
    for _ in range(4):
        artifact.post()
    assert list(server.posted.values()) == [[("a", "1"), ("b", "2")]]


def test_what_a_server_that_was_away_missed_is_posted_the_next_time(server):
    artifact = live(lambda: ("a", "1"))
    server.away = True
    artifact.post()
    server.away = False
    artifact.post()
    assert list(server.posted.values()) == [[("a", "1")]]


def test_not_more_often_than_asked_but_always_at_the_end(server):
    looks = []
    artifact = live(lambda: (looks.append(1), ("a", str(len(looks))))[1], seconds=3600)
    for _ in range(3):
        artifact.post()
    assert len(looks) == 1
    artifact.post(now=True)
    assert list(server.posted.values()) == [[("a", "1"), ("a", "2")]]


def test_what_cannot_be_drawn_is_one_warning_and_the_progress_goes_on(server, caplog):
    def broken():
        raise ValueError("no such colour")

    with caplog.at_level(logging.WARNING), StageReporter("pretrain", str(uuid4()), logging.getLogger("run")) as report:
        report.show("pretrain-loss", broken, 0.0)
        report(Progress(1, 4, "steps", warning="step 1: not finite"))
        report(Progress(2, 4, "steps"))
    said = [record.message for record in caplog.records if record.name == "run"]
    assert said == ["step 1: not finite", "pretrain-loss is no longer shown in the UI (ValueError: no such colour)"]
    assert list(server.posted.values()) == [[(50.0, "2/4 steps")]]


def test_the_progress_has_the_newest_warnings_below_it_and_ends_without_what_was_done_last(server):
    with StageReporter("pretrain", str(uuid4()), logging.getLogger("run")) as report:
        report(Progress(4, 4, "steps", note="writing a checkpoint"))
        told = [f"warning {number}" for number in range(artifacts.WARNINGS_SHOWN + 2)]
        for warning in told:
            report.warn(warning)
        assert report._progress() == (100.0, "\n".join(["4/4 steps, writing a checkpoint", *told[2:]]))
    [posted] = server.posted.values()
    assert posted[-1][1].splitlines()[0] == "4/4 steps"


def test_a_stage_with_nothing_to_do_says_so(server):
    with StageReporter("pretrain", str(uuid4()), logging.getLogger("run")) as report:
        report(Progress(4, 4, "steps"))
        report.skipped("finished before")
    [posted] = server.posted.values()
    assert posted[-1] == (100.0, "skipped: finished before")


@pytest.mark.parametrize(
    ("recipe", "overrides", "name"),
    [
        ("mini", [], "pretrain mini"),
        ("/home/a/own.yaml", None, "pretrain my-recipe"),  # as its file says
        ("/home/b/own.v2.yaml", [], "pretrain own.v2"),  # deployed from another machine
        ("mini", ["seed=2", 'run="photos-1"'], "pretrain mini photos-1"),
    ],
)
def test_a_run_is_named_by_its_flow_and_its_recipe(monkeypatch, recipe, overrides, name):
    run = SimpleNamespace(flow_name="pretrain", parameters={"recipe": recipe, "overrides": overrides})
    monkeypatch.setattr(stage_module, "known_recipes", lambda: {"mini": "mini", "my-recipe": "/home/a/own.yaml"})
    monkeypatch.setattr(stage_module, "runtime", SimpleNamespace(flow_run=run))
    assert stage_module.run_name() == name


def test_keys_tables_and_pictures_as_the_ui_takes_them():
    assert artifact_key("finetune.0-loss_by_t") == "finetune-0-loss-by-t"
    assert markdown_table([{"a": 1, "b": "x|y"}]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    assert markdown_picture("x", b"\x89PNG") == "![x](data:image/png;base64,iVBORw==)"
    assert markdown_picture("x", b"\xff\xd8").startswith("![x](data:image/jpeg;base64,")
