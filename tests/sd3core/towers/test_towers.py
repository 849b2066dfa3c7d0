"""The towers artifact: made one by one, resumed, committed, fetched with its digests checked."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_towers import TINY, drawings

import sd3core.data.checked_files as checked_files_module
from sd3core.data.store import open_store
from sd3core.errors import DataError, UserError
from sd3core.metrics.clip_score import image_embeddings
from sd3core.recipe import Text
from sd3core.towers.artifact import (
    TOWER_FOLDERS,
    check_vae_folder,
    checked_files,
    commit_tower,
    commit_towers,
    damaged_towers,
    fetch_towers,
    finished_towers,
    read_towers,
)
from sd3core.towers.judge import load_judge
from sd3core.towers.text_encoders import load_text_encoders
from sd3core.towers.training import make


@pytest.fixture
def store(tmp_path: Path):
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def committed(store, towers_folder: Path):
    for name in TOWER_FOLDERS:
        commit_tower(store, "towers/t/0", name, towers_folder, {"steps": 1})
    return commit_towers(store, "towers/t/0", {"towers": "tiny"})


def test_the_manifest_waits_for_all_towers_and_keeps_those_that_stand(store, towers_folder: Path):
    first, last = list(TOWER_FOLDERS)[:3], list(TOWER_FOLDERS)[3:]
    before = {name: commit_tower(store, "towers/t/0", name, towers_folder, {"steps": 1}) for name in first}
    with pytest.raises(DataError, match="t5, judge"):
        commit_towers(store, "towers/t/0", {"a": 1})
    assert finished_towers(store, "towers/t/0") == before
    for name in last:
        commit_tower(store, "towers/t/0", name, towers_folder, {"steps": 2})
    manifest = commit_towers(store, "towers/t/0", {"a": 1})
    assert all(manifest.towers[name] == entry for name, entry in before.items())
    assert read_towers(store, "towers/t/0") == read_towers(store, "towers/t/0", manifest.digest) == manifest
    assert store.get_json("towers/t/0/training.json") == {name: {"steps": 1} for name in first} | {
        name: {"steps": 2} for name in last
    }


def test_the_same_seed_makes_the_same_bytes(towers_folder: Path, tmp_path: Path, store, committed):
    pictures, captions = drawings(16)
    for name in TOWER_FOLDERS:
        make.make_small_tower(name, TINY, pictures, captions, 0, tmp_path / "again")
        assert commit_tower(store, "again", name, tmp_path / "again", {}).digest == committed.digests[name], name


def test_fetch_gives_a_folder_that_opens_and_only_what_was_asked(store, committed, tmp_path: Path):
    some = fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    assert sorted(p.name for p in some.iterdir() if p.name[0] != ".") == ["vae"]
    folder = fetch_towers(store, "towers/t/0", tmp_path / "cache")
    assert folder == some
    assert len(load_text_encoders(folder, Text(clip_tokens=8, t5_tokens=8)).encode(["a red bar"])) == 1


def test_what_killed_fetches_left_is_removed(store, committed, tmp_path: Path):
    vae = fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",)) / "vae"
    for name, written in ((".fetch-killed", 0), (".fetch-at-work", None)):
        (vae / name).mkdir()
        (vae / name / "model.safetensors").write_bytes(b"half")
        if written is not None:
            os.utime(vae / name / "model.safetensors", (written, written))
    (vae / "config.json").unlink()
    fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    assert sorted(path.name for path in vae.glob(".fetch-*")) == [".fetch-at-work"]
    assert (vae / "config.json").is_file()


@pytest.fixture
def elsewhere(store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The store as one on another machine, which copies; the paths that were fetched from it."""
    fetched: list[str] = []

    def get_file(self, path: str, local: Path) -> None:
        fetched.append(path)
        time.sleep(0.02)
        shutil.copyfile(self.root / path, local)

    monkeypatch.setattr(type(store), "get_file", get_file)
    monkeypatch.setattr(type(store), "local_path", lambda self, path: None)
    monkeypatch.setattr(type(store), "get", lambda self, path: (self.root / path).read_bytes())
    monkeypatch.setattr(type(store), "exists", lambda self, path: (self.root / path).exists())
    monkeypatch.setattr(type(store), "version", lambda self, path: ((self.root / path).stat().st_size, "etag"))
    return fetched


def test_of_eight_that_want_the_towers_at_once_one_fetches_each_file(store, committed, elsewhere, tmp_path: Path):
    with ThreadPoolExecutor(8) as actors:  # locks are of open files, so threads keep each other out as processes do
        folders = list(actors.map(lambda _: fetch_towers(store, "towers/t/0", tmp_path / "cache"), range(8)))
    assert len(set(folders)) == 1
    assert sorted(elsewhere) == sorted(
        f"towers/t/0/{path}" for entry in committed.towers.values() for path in entry.files
    )


def test_one_that_is_killed_while_it_fetches_holds_nobody_up_and_leaves_nothing_half(
    store, committed, elsewhere, tmp_path: Path
):
    began = tmp_path / "began"

    def fetch_and_hang() -> None:
        def get_file(self, path: str, local: Path) -> None:
            Path(local).write_bytes(b"half")
            began.touch()
            time.sleep(60)

        type(store).get_file = get_file  # of the child alone
        fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))

    child = multiprocessing.get_context("fork").Process(target=fetch_and_hang)
    child.start()
    deadline = time.monotonic() + 30
    while not began.exists():
        assert child.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    lock = next((tmp_path / "cache").glob("towers-*/.vae.lock"))
    with lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    child.kill()
    child.join()
    folder = fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    assert {str(path.relative_to(folder)) for path in (folder / "vae").iterdir() if path.is_file()} == {
        *committed.towers["vae"].files
    }


def test_a_damaged_file_is_found(store, committed, tmp_path: Path):
    store.put("towers/t/0/vae/config.json", b"{}")
    with pytest.raises(DataError, match="vae/config.json"):
        fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))


def flip(path: Path, position: int = -1) -> None:
    """One bit, the size stays."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_bits_that_flip_after_the_first_fetch_are_found(store, committed, tmp_path: Path):
    """In a store on this machine the cache is a link into it."""
    path = "vae/diffusion_pytorch_model.safetensors"
    fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    flip(store.local_path(f"towers/t/0/{path}"))
    with pytest.raises(DataError, match=path):
        fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    finished = finished_towers(store, "towers/t/0")
    assert damaged_towers(store, "towers/t/0", finished, checked_files(tmp_path / "cache")) == {"vae": path}


def test_a_damaged_tower_of_a_store_elsewhere_is_named_and_made_again(s3_bucket, towers_folder: Path, tmp_path: Path):
    """By the towers stage, where nothing has been deleted by hand; what it finds whole is read once."""
    store, cache, folder = open_store(f"s3://{s3_bucket}"), tmp_path / "cache", "towers/t/0"
    for name in TOWER_FOLDERS:
        commit_tower(store, folder, name, towers_folder, {"steps": 1})
    manifest, checked = commit_towers(store, folder, {"towers": "tiny"}), checked_files(cache)
    path = "vae/diffusion_pytorch_model.safetensors"
    assert damaged_towers(store, folder, manifest.towers, checked) == {}
    data = store.get(f"{folder}/{path}")
    store.put(f"{folder}/{path}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(
        DataError, match=f"{path}: damaged, not the file that was committed; run the towers stage: it makes"
    ):
        fetch_towers(store, folder, cache, only=("vae",))
    finished = finished_towers(store, folder)
    assert damaged_towers(store, folder, finished, checked) == {"vae": path}
    commit_tower(store, folder, "vae", towers_folder, {}, pinned=finished["vae"])
    assert damaged_towers(store, folder, finished, checked) == {}
    assert (fetch_towers(store, folder, cache, only=("vae",)) / path).read_bytes() == data


def test_a_damaged_copy_is_fetched_again(store, committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a store elsewhere the cache has copies."""
    monkeypatch.setattr(type(store), "get_file", lambda self, path, local: shutil.copyfile(self.root / path, local))
    monkeypatch.setattr(type(store), "local_path", lambda self, path: None)
    monkeypatch.setattr(type(store), "get", lambda self, path: (self.root / path).read_bytes())
    monkeypatch.setattr(type(store), "version", lambda self, path: ((self.root / path).stat().st_size, "etag"))
    path = "vae/diffusion_pytorch_model.safetensors"
    local = fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    flip(local / path)
    fetch_towers(store, "towers/t/0", tmp_path / "cache", only=("vae",))
    assert (local / path).read_bytes() == (store.root / "towers/t/0" / path).read_bytes()


def test_files_are_read_once_a_machine_and_again_on_request(store, committed, tmp_path: Path, monkeypatch):
    read: list[Path] = []
    real = checked_files_module.sha256_of
    monkeypatch.setattr(checked_files_module, "sha256_of", lambda path: read.append(path) or real(path))
    folder = fetch_towers(store, "towers/t/0", tmp_path / "cache")
    count = sum(len(entry.files) for entry in committed.towers.values())
    assert len(read) == count
    fetch_towers(store, "towers/t/0", tmp_path / "cache")
    assert len(read) == count
    status = (folder / "vae/config.json").stat()
    flip(folder.joinpath("vae/config.json").resolve())
    # as a disk's own damage leaves it
    os.utime(folder / "vae/config.json", ns=(status.st_atime_ns, status.st_mtime_ns))
    fetch_towers(store, "towers/t/0", tmp_path / "cache")
    with pytest.raises(DataError, match="vae/config.json"):
        fetch_towers(store, "towers/t/0", tmp_path / "cache", reread=True)


def test_a_tower_made_again_for_a_damaged_one_must_be_the_same(store, committed, towers_folder: Path, tmp_path: Path):
    entry = committed.towers["vae"]
    assert commit_tower(store, "towers/t/0", "vae", towers_folder, {"steps": 9}, pinned=entry) == entry
    shutil.copytree(towers_folder / "vae", tmp_path / "other/vae")
    (tmp_path / "other/vae/config.json").write_text("{}")
    with pytest.raises(DataError, match="tower vae is damaged, and made again it is another one"):
        commit_tower(store, "towers/t/0", "vae", tmp_path / "other", {}, pinned=entry)


def test_a_damaged_done_record_comes_back_from_the_manifest(store, committed):
    before = store.get("towers/t/0/vae.done.json")
    for damaged in (before[:-9], before.replace(b'"digest": "', b'"digest": "0', 1)):
        store.put("towers/t/0/vae.done.json", damaged)
        assert finished_towers(store, "towers/t/0")["vae"] == committed.towers["vae"]
        assert store.get("towers/t/0/vae.done.json") == before


def test_a_vae_of_other_channels_than_the_models_is_refused_in_one_line(towers_folder: Path, tmp_path: Path):
    check_vae_folder(towers_folder, 16)
    (tmp_path / "vae").mkdir()
    config = json.loads((towers_folder / "vae/config.json").read_text())
    for channels in (4, 32):
        (tmp_path / "vae/config.json").write_text(json.dumps(config | {"latent_channels": channels}))
        with pytest.raises(DataError, match=f"latent_channels is {channels}, the model takes latents of 16"):
            check_vae_folder(tmp_path, 16)
    check_vae_folder(tmp_path / "not here", 16)  # the folder's own check names it
    with pytest.raises(UserError, match="no home of that user"):
        check_vae_folder("~nobody-of-this-name/vae", 16)


def test_no_towers_says_which_stage_to_run(store):
    with pytest.raises(DataError, match="run the towers stage"):
        fetch_towers(store, "towers/none", Path("unused"))


def test_the_judges_features_have_one_width_for_any_sizes(towers_folder: Path):
    judge = load_judge(towers_folder)
    pictures, captions = drawings(5)
    assert image_embeddings(judge, pictures).shape == (5, 32)
    features = judge.text_features(captions)
    assert features.shape == (5, 32) and np.allclose(features.norm(dim=1), 1, atol=1e-5)


def test_ten_photographs_are_enough():
    generator = np.random.default_rng(0)
    photographs = [generator.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in [(97, 130), (64, 20), (33, 200)]]
    assert make.train_vae(TINY.vae, photographs, 0)[1]["steps"] == 4


@pytest.mark.parametrize(("count", "match"), [(0, "no picture"), (2, "no captions")])
def test_nothing_to_learn_from_is_a_data_error(tmp_path: Path, count: int, match: str):
    with pytest.raises(DataError, match=match):
        make.make_small_tower("clip_l", TINY, drawings(count)[0], [""] * count, 0, tmp_path)
