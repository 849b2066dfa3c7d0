"""What is in use by anybody's records stays, on files and on S3; what is not goes in an order that no kill makes half a truth."""

from __future__ import annotations

import time

import pytest

from sd3core.checkpoint_record import CheckpointDone
from sd3core.data.begun import all_begun, begin, end
from sd3core.data.manifest import Manifest, ShardEntry, commit_manifest, read_manifest
from sd3core.data.shards import finished_stems
from sd3core.data.store import FileStore
from sd3core.data.unused import find_unused, remove
from sd3core.errors import DataError, StoreError
from sd3core.towers.artifact import TOWER_FOLDERS, commit_tower, commit_towers

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
    manifest = Manifest(
        stage=stage, spec=spec * 12, fields=fields or {}, inputs=inputs or {}, folder=folder, shards=entries
    )
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


def kept(store) -> dict[str, str]:
    """What only its own name removes, and why."""
    return {item.name: item.why for item in find_unused(store, NOW) if item.unfinished}


def later(store) -> None:
    """What is written from here on has a later time: S3 counts seconds."""
    time.sleep(0.02 if isinstance(store, FileStore) else 1.1)


def exported(store, spec: str) -> str:
    store.put_json(f"runs/r/export/{spec * 12}/MANIFEST.json", {})
    return f"runs/r/export/{spec * 12}"


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
    made(store, "raw", "1", shards(store, folder, 0, 2, content="c"))
    made(store, "raw", "1", shards(store, folder, 0, 1, content="b"))  # the source changed; another run uses the first
    store.put(f"{folder}/NULL.safetensors", b"null")
    store.put(f"{folder}/a note of a person.txt", b"mine")
    note(store, "r", "ingest", folder, first.digest)
    (item,) = find_unused(store, NOW)
    assert item.name == f"{folder}/shards"
    assert {entry.path.rpartition("/")[2][:18] for entry in item.entries} == {f"0000{n}." + "c" * 12 for n in (0, 2)}
    assert item.bytes == 30 and not item.unfinished
    remove(store, item)
    assert finished_stems(store, folder).keys() == {f"{n:05d}.{c * 12}" for n in (0, 1) for c in "ab"}
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
    old, started_from, newest = (checkpoint(store, "r", spec) for spec in "123")
    later(store)
    note(store, "r", "pretrain", newest)
    store.put("runs/r/previews/pretrain-111111111111/000000000008.png", b"png")
    checkpoint(store, "other", "4", start_from=f"{store.url}/{started_from}/000000000008")
    checkpoint(store, "at-work", "5")  # it has noted nothing
    store.put("runs/never-begun/logs/pretrain-1/events", b"x")
    assert names(store) == ["runs/never-begun", old] and not kept(store)
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
        if len(deleted) >= 4:
            raise KeyboardInterrupt
        deleted.append(path)
        delete(path)

    store.delete = killed
    with pytest.raises(KeyboardInterrupt):
        remove(store, item)
    with pytest.raises(DataError):
        read_manifest(store, ref.folder)
    assert finished_stems(store, ref.folder).keys() == set()
    store.delete = delete
    (rest,) = find_unused(store, NOW)
    assert not rest.unfinished  # its manifest's copy goes last
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
    for path in (
        "mine/x",
        "datasets/d/raw/mine/x",
        "datasets/d/other/111111111111/x",
        "towers/t/mine/x",
        "datasets/x",
        "runs",
    ):
        store.put(path, b"x")
    store.put("references/d/111111111111x/DONE.json", b"{}")
    assert names(store) == []


def test_a_training_that_is_newer_than_the_noted_one_is_kept(store):
    noted = checkpoint(store, "r", "1")
    note(store, "r", "pretrain", noted)
    later(store)
    # with other settings, stopped; this store was written before runs said what they begin
    newer = checkpoint(store, "r", "2")
    assert names(store) == [newer] and "written to after 111111111111" in kept(store)[newer]
    later(store)
    note(store, "r", "pretrain", checkpoint(store, "r", "3"))
    assert names(store) == [noted, newer] and not kept(store)


def test_a_training_that_has_begun_is_kept_whatever_the_times_say_with_what_it_starts_from(store):
    start, stopped, noted = (checkpoint(store, "r", spec) for spec in "123")
    latents = made(store, "latents", "4")
    begin(store, "r", "pretrain", stopped, {"latents": latents.digest}, [None])
    begin(
        store,
        "elsewhere",
        "pretrain",
        "runs/elsewhere/checkpoints/pretrain/" + "5" * 12,
        needs=[f"{store.url}/{start}/000000000008"],
    )
    later(store)
    note(store, "r", "pretrain", noted)
    why = kept(store)
    # killed before its first byte
    assert names(store) == sorted(why) == ["runs/elsewhere/checkpoints/pretrain/555555555555/unfinished", stopped]
    assert "pretrain of run r began 20" in why[stopped] and "the same command goes on" in why[stopped]
    for item in find_unused(store, NOW):
        assert remove(store, item)  # by its own name: its word goes with it
    assert not all_begun(store) and names(store) == [latents.folder, start]


def test_the_trainings_of_a_pipeline_that_has_not_ended_are_kept(store):
    between_phases = checkpoint(store, "r", "1")  # another home's, which was killed before its fine-tuning
    later(store)
    note(store, "r", "pretrain", checkpoint(store, "r", "2"))
    begin(store, "r", "pipeline", "runs/r")
    assert sorted(kept(store)) == names(store) == [between_phases, "runs/r/unfinished"]
    end(store, "r", "pipeline", "runs/r")
    assert names(store) == [between_phases] and not kept(store)


def test_an_export_is_superseded_by_one_that_was_named_later(store):
    older = exported(store, "1")
    later(store)
    named = exported(store, "2")
    store.put_json(
        "runs/r/summary.json", {"stages": [{"name": "export", "manifest": store.uri(f"{named}/MANIFEST.json")}]}
    )
    assert names(store) == [older] and not kept(store)
    later(store)
    newer = exported(store, "3")  # by the stage alone
    assert names(store) == [older, newer] and list(kept(store)) == [newer]
    note(store, "r", "export", newer)
    assert names(store) == [older]


def test_what_an_interrupted_stage_made_is_unfinished(store):
    raw = made(store, "raw", "1")
    note(store, "r", "ingest", raw.folder, raw.digest)
    shards(store, raw.folder, 2, 3)  # more images, and no manifest yet
    shards(store, "datasets/d/latents/" + "2" * 12, 0)  # a first encode
    store.put("towers/t/" + "3" * 12 + "/vae/config.json", b"{}")
    nobodys = made(store, "text", "4")
    later(store)
    shards(store, nobodys.folder, 2)
    references = "references/d/" + "5" * 12
    store.put_json(f"{references}/DONE.json", {})
    assert list(kept(store)) == [
        "datasets/d/latents/222222222222",
        f"{raw.folder}/unfinished",
        nobodys.folder,
        "towers/t/333333333333",
    ]
    begin(store, "r", "evaluate", "runs/r/evaluations", needs=["references/d"])
    assert references in kept(store) and "runs/r/evaluations/unfinished" in kept(store)
    end(store, "r", "evaluate", "runs/r/evaluations")
    assert references in names(store) and references not in kept(store)


def test_a_folder_that_a_run_has_begun_is_kept_with_its_inputs(store):
    raw, folder = made(store, "raw", "1"), "datasets/d/latents/" + "2" * 12
    begin(store, "r", "latents.pretrain", folder, {"inputs": {"raw": raw.digest}})
    assert list(kept(store)) == names(store) == [f"{folder}/unfinished"]
    made(store, "latents", "2", shards(store, folder, 0))  # the run may go back to it
    note(
        store,
        "other",
        "latents.pretrain",
        folder,
        made(store, "latents", "2", shards(store, folder, 0, content="b")).digest,
    )
    assert list(kept(store)) == names(store) == [f"{folder}/unfinished"]
    end(store, "r", "latents.pretrain", folder)
    assert names(store) == [f"{folder}/shards", raw.folder] and not kept(store)


def test_a_home_gives_up_what_it_begins_anew_and_another_home_does_not(store, monkeypatch):
    first, second = (f"runs/r/checkpoints/finetune.0/{spec * 12}" for spec in "12")
    for home in "ab":
        monkeypatch.setenv("SD3_HOME", f"/{home}")
        begin(store, "r", "finetune.0", first)
    begin(store, "r", "finetune.0", second)
    assert [(each.stage, each.folder) for each in all_begun(store)] in (
        [("finetune.0", first), ("finetune.0", second)],
        [("finetune.0", second), ("finetune.0", first)],
    )
    end(store, "r", "finetune.0", second)
    assert [each.folder for each in all_begun(store)] == [first]
    begin(store, "r", "finetune", first)
    begin(store, "r", "finetune.0", first)
    end(store, "r", "finetune.0", first)  # also that of the home which was killed over it
    assert [each.stage for each in all_begun(store)] == ["finetune"]
    end(store, "r", "finetune", first)
    end(store, "r", "finetune", first)
    assert not all_begun(store)


def test_what_a_run_begins_after_the_list_was_made_is_not_removed(store):
    raw, towers = made(store, "raw", "1"), "towers/t/" + "2" * 12
    store.put_json(f"{towers}/MANIFEST.json", {})
    old = checkpoint(store, "r", "3")
    later(store)
    note(store, "r", "pretrain", checkpoint(store, "r", "4"))
    found = find_unused(store, NOW)
    assert [item.name for item in found] == [raw.folder, old, towers]
    begin(
        store,
        "s",
        "pretrain",
        "runs/s/checkpoints/pretrain/" + "5" * 12,
        {"raw": raw.digest},
        [f"{store.url}/{old}/000000000008"],
    )
    begin(store, "s", "towers", towers)
    assert not any(remove(store, item) for item in found) and read_manifest(store, raw.folder) and store.list(old)


def test_the_stores_clock_counts_and_not_this_machines(file_store, monkeypatch):
    made(file_store, "raw", "1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 365 * 24 * 3600)
    assert names(file_store, days=7.0) == [] and names(file_store) != []


def test_every_store_knows_its_time(store):
    store.put("x", b"x")
    assert abs(store.now() - store.list()[0].modified) < 30


def test_each_folder_is_listed_once_and_no_shard_is_read(file_store, monkeypatch):
    """A store with 100,000 shards has hundreds of pages to list."""
    raw = made(file_store, "raw", "1", shards(file_store, "datasets/d/raw/" + "1" * 12, *range(300)))
    latents = made(
        file_store,
        "latents",
        "2",
        shards(file_store, "datasets/d/latents/" + "2" * 12, *range(300)),
        {"raw": raw.digest},
    )
    made(file_store, "latents", "3")
    for run in "rst":
        note(file_store, run, "latents.pretrain", latents.folder, latents.digest)
        for spec in "45":
            folder = checkpoint(file_store, run, spec)
            for samples in range(16, 80, 8):
                file_store.put_json(f"{folder}/{samples:012d}/DONE.json", {})
    listed, read = [], []
    listing, get = FileStore.list, FileStore.get
    monkeypatch.setattr(FileStore, "list", lambda self, prefix="": listed.append(prefix) or listing(self, prefix))
    monkeypatch.setattr(FileStore, "get", lambda self, path: read.append(path) or get(self, path))
    assert names(file_store) == ["datasets/d/latents/333333333333"]
    data = ["datasets/d/latents/222222222222", "datasets/d/latents/333333333333", "datasets/d/raw/111111111111"]
    assert sorted(listed) == ["begun", *data, "runs/r", "runs/s", "runs/t"]
    assert len(read) == 3 * 3 + 2 * 2 and not any(".done." in path or path.endswith(".tar") for path in read)
