"""What is in use by anybody's records stays, on files and on S3; what is not goes in an order that no kill makes half a truth."""

from __future__ import annotations

import pytest

from sd3core.checkpoint import CheckpointDone
from sd3core.data.manifest import Manifest, ShardEntry, commit_manifest, read_manifest
from sd3core.data.shards import finished_stems
from sd3core.data.unused import find_unused, remove
from sd3core.errors import DataError, StoreError
from sd3core.towers import TOWER_FOLDERS, commit_tower, commit_towers

NOW = -1.0  # days: whatever was written until tomorrow


def shards(store, folder: str, *numbers: int, content: str = "a") -> list[ShardEntry]:
    entries = []
    for number in numbers:
        stem = f"{number:05d}.{content * 12}"
        for ending in (".tar", ".index.parquet", ".done.json"):
            store.put(f"{folder}/{stem}{ending}", b"12345")
        entries.append(ShardEntry(number=number, stem=stem, rows=1, bytes=15, digest="d" * 64))
    return entries


def made(store, stage: str, spec: str, entries=None, inputs=None, fields=None):
    folder = f"datasets/d/{stage}/{spec * 12}"
    entries = shards(store, folder, 0, 1) if entries is None else entries
    manifest = Manifest(stage=stage, spec=spec * 12, fields=fields or {}, inputs=inputs or {}, folder=folder, shards=entries)
    return commit_manifest(store, folder, manifest)


def note(store, run: str, stage: str, folder: str, digest: str = "0" * 64, **fields) -> None:
    store.put_json(f"runs/{run}/stages/{stage}.json", {"folder": folder, "digest": digest, "fields": fields})


def checkpoint(store, run: str, spec: str, start_from: str | None = None) -> str:
    folder = f"runs/{run}/checkpoints/pretrain/{spec * 12}"
    done = CheckpointDone(
        samples=8, steps=1, attempt=1, optimizer_step=1, config={}, training={}, parameters={}, files={},
        specs={}, null="zeros", recipe={"model": {"start_from": start_from}},
    )  # fmt: skip
    store.put(f"{folder}/000000000008/rank-000-of-001.safetensors", b"weights")
    store.put_json(f"{folder}/000000000008/DONE.json", done.model_dump(mode="json"))
    return folder


def names(store, days: float = NOW) -> list[str]:
    return [item.name for item in find_unused(store, days)]


def test_a_manifests_inputs_are_in_use_and_other_specs_are_not(store):
    raw = made(store, "raw", "1")
    latents = made(store, "latents", "2", inputs={"raw": raw.digest})
    made(store, "raw", "3")
    made(store, "latents", "4")
    note(store, "r", "latents.pretrain", latents.folder, latents.digest)  # of a run on any machine
    assert names(store) == ["datasets/d/latents/444444444444", "datasets/d/raw/333333333333"]
    assert names(store, days=1.0) == []  # a run at work elsewhere has not noted what it has just written
    made(store, "text", "5")
    assert "datasets/d/text/555555555555" in names(store)


def test_of_a_folder_in_use_only_shards_that_no_manifest_in_use_names(store):
    folder = "datasets/d/raw/" + "1" * 12
    first = made(store, "raw", "1", shards(store, folder, 0, 1))
    made(store, "raw", "1", shards(store, folder, 0, 1, content="b"))  # the source changed; another run uses the first
    shards(store, folder, 2, content="c")
    store.put(f"{folder}/NULL.safetensors", b"null")
    store.put(f"{folder}/a note of a person.txt", b"mine")
    note(store, "r", "ingest", folder, first.digest)
    (item,) = find_unused(store, NOW)
    assert item.name == f"{folder}/shards"
    assert {entry.path.rpartition("/")[2][:18] for entry in item.entries} == {"00002." + "c" * 12} and item.bytes == 15
    remove(store, item)
    assert finished_stems(store, folder) == {f"{n:05d}.{c * 12}" for n in (0, 1) for c in "ab"}
    assert read_manifest(store, folder, first.digest) and store.exists(f"{folder}/a note of a person.txt")


def test_towers_and_references_by_what_names_their_digests(store, tmp_path):
    for spec, text in (("1", "used"), ("2", "old")):
        for name, parts in TOWER_FOLDERS.items():
            for part in parts:
                (tmp_path / spec / part).mkdir(parents=True, exist_ok=True)
                (tmp_path / spec / part / "config.json").write_text(text)
            commit_tower(store, f"towers/t/{spec * 12}", name, tmp_path / spec, {})
    used = commit_towers(store, "towers/t/" + "1" * 12, {})
    commit_towers(store, "towers/t/" + "2" * 12, {})
    latents = made(store, "latents", "3", fields={"vae": used.digests["vae"]})
    note(store, "r", "latents.pretrain", latents.folder, latents.digest)
    for spec in "45":
        store.put_json(f"references/d/{spec * 12}/DONE.json", {})
    store.put_json("runs/r/evaluations/scores.json", {"protocols": {"0" * 12: {"reference_set": "4" * 12}}})
    assert names(store) == ["references/d/" + "5" * 12, "towers/t/" + "2" * 12]


def test_checkpoints_that_were_trained_again_and_are_nobodys_start(store):
    old, kept, newest = (checkpoint(store, "r", spec) for spec in "123")
    note(store, "r", "pretrain", newest)
    store.put("runs/r/previews/pretrain-111111111111/000000000008.png", b"png")
    checkpoint(store, "other", "4", start_from=f"{store.url}/{kept}/000000000008")
    checkpoint(store, "at-work", "5")  # it has noted nothing
    store.put("runs/never-begun/logs/pretrain-1/events", b"x")
    assert names(store) == ["runs/never-begun", old]
    item = find_unused(store, NOW)[1]
    assert any(entry.path.startswith("runs/r/previews/") for entry in item.entries)
    gone = []
    store.delete = gone.append
    remove(store, item)
    assert gone[0].endswith("/DONE.json") and len(gone) == 3


def test_a_removal_that_was_killed_leaves_nothing_that_is_taken_for_whole(store):
    ref = made(store, "raw", "1")
    (item,) = find_unused(store, NOW)
    delete, deleted = store.delete, []

    def killed(path: str) -> None:
        if len(deleted) == 4:
            raise KeyboardInterrupt
        deleted.append(path)
        delete(path)

    store.delete = killed
    with pytest.raises(KeyboardInterrupt):
        remove(store, item)
    with pytest.raises(DataError):
        read_manifest(store, ref.folder)
    assert finished_stems(store, ref.folder) == set()
    store.delete = delete
    (rest,) = find_unused(store, NOW)
    remove(store, rest)
    assert store.list() == []


def test_nothing_is_removed_by_a_guess(store):
    folder = made(store, "raw", "1").folder
    note(store, "r", "ingest", folder)
    shards(store, folder, 7)
    store.put(f"{folder}/MANIFEST.json", b"{")  # what it named is not known
    assert names(store) == []
    store.put("runs/r/stages/text.json", b"{")
    with pytest.raises(StoreError):
        find_unused(store, NOW)


def test_what_is_not_of_this_projects_layout_is_not_looked_at(store):
    for path in ("mine/x", "datasets/d/raw/mine/x", "datasets/d/other/111111111111/x", "towers/t/mine/x", "datasets/x", "runs"):
        store.put(path, b"x")
    store.put("references/d/111111111111x/DONE.json", b"{}")
    assert names(store) == []
