from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from flows.session import RunBusyError, run_lock
from sd3core.data.begun import begin
from sd3core.data.manifest import Manifest, commit_manifest
from sd3core.data.store import open_store

UNUSED = "datasets/d/raw/" + "1" * 12


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    store = open_store(str(tmp_path / "home" / "store"))
    for spec in "12":
        folder = f"datasets/d/raw/{spec * 12}"
        ref = commit_manifest(
            store, folder, Manifest(stage="raw", spec=spec * 12, fields={}, inputs={}, folder=folder, shards=[])
        )
    store.put_json("runs/r/stages/ingest.json", {"folder": ref.folder, "digest": ref.digest, "fields": {}})
    (tmp_path / "home" / "cache" / "towers-0123").mkdir(parents=True)
    (tmp_path / "home" / "cache" / "towers-0123" / "model.safetensors").write_bytes(b"12345")
    month_ago = time.time() - 30 * 24 * 3600
    for path in (tmp_path / "home").rglob("*"):
        os.utime(path, (month_ago, month_ago))
    return store


def test_it_lists_and_touches_nothing(sd3, store):
    before = store.list()
    code, out, _ = sd3("clean")
    assert code == 0 and UNUSED in out and "cache/towers-0123" in out and "222222222222" not in out
    assert "2 things" in out and store.list() == before


def test_it_removes_what_is_named_and_refuses_what_is_in_use(sd3, store):
    code, _, said = sd3("clean", "--remove", "datasets/d/raw/222222222222")
    assert code == 1 and "not in the list" in said and said.count("\n") == 1
    assert sd3("clean", "--remove", UNUSED)[0] == 0
    assert store.folders("datasets/d/raw") and not store.list(UNUSED)
    cached = Path(os.environ["SD3_HOME"]) / "cache" / "towers-0123"
    assert cached.exists() and sd3("clean", "--remove", "all")[0] == 0 and not cached.exists()
    assert "nothing is unused" in sd3("clean")[1] and "nothing to remove" in sd3("clean", "--remove", "all")[1]


def test_nothing_goes_while_a_run_is_at_work(sd3, store):
    with run_lock(store.url, "tiny_test", seconds=0):
        code, _, said = sd3("clean", "--remove", "all")
        with (
            pytest.raises(RunBusyError, match=f"run tiny_test: process {os.getpid()} works on it"),
            run_lock(store.url, "tiny_test", seconds=0),
        ):
            pass
    assert code == 1 and f"run tiny_test (process {os.getpid()}) is at work" in said and store.list(UNUSED)


def test_what_is_unfinished_goes_by_its_own_name_alone(sd3, store, monkeypatch):
    begun = f"datasets/d/latents/{'3' * 12}"
    monkeypatch.setattr("socket.gethostname", lambda: "another-machine")
    begin(store, "r", "latents.pretrain", begun, {})
    store.put(f"{begun}/00000.{'4' * 12}.tar", b"12345")
    month_ago = time.time() - 30 * 24 * 3600
    for entry in store.list():
        os.utime(store.local_path(entry.path), (month_ago, month_ago))
    out = " ".join(sd3("clean")[1].split())
    assert begun in out and "unfinished:" in out and "`--remove all` all that is not unfinished" in out
    said = sd3("clean", "--remove", "all")[1]
    assert (
        f"removed {UNUSED}" in said and f"kept {begun} (0.000 GB): unfinished: latents.pretrain of run r began" in said
    )
    assert "on another-machine and has not ended" in said and store.list(begun)
    assert (
        f"removed {begun}" in sd3("clean", "--remove", begun)[1] and not store.list(begun) and not store.list("begun")
    )
