"""Provenance names what made an object, beside it: equal bytes made elsewhere keep their digests, and older objects load."""

from __future__ import annotations

import getpass
import hashlib
import json
import socket
import subprocess

from sd3core.checkpoint_record import CheckpointDone
from sd3core.data import provenance as module
from sd3core.data.manifest import Manifest, commit_manifest, read_manifest
from sd3core.data.provenance import (
    Provenance,
    provenance,
    provenance_file,
    provenance_of,
    provenance_path,
    put_provenance,
    read_provenance,
)
from sd3core.data.records import FileRecord
from sd3core.data.store import open_store
from sd3core.towers.artifact import TOWER_FOLDERS, commit_tower, commit_towers, read_towers

FOLDER = "datasets/d/latents/0123456789ab"
HERE = Provenance(version="1", device="one kind", devices=2, made=3, seconds=1.5)
THERE = Provenance(version="2", commit="c" * 40, lock="cuda " + "e" * 64, device="another", devices=256)
MANIFEST = Manifest(stage="latents", spec="0" * 12, fields={"format": 1}, inputs={}, folder=FOLDER, shards=[])


def test_equal_manifests_of_two_machines_are_equal_bytes_and_each_names_its_maker(tmp_path):
    stores = [open_store(str(tmp_path / name)) for name in ("a", "b")]
    refs = [commit_manifest(store, FOLDER, MANIFEST, maker) for store, maker in zip(stores, (HERE, THERE), strict=True)]
    assert refs[0] == refs[1]
    assert stores[0].get(refs[0].path) == stores[1].get(refs[1].path)
    assert [provenance_of(store, refs[0].path) for store in stores] == [[HERE], [THERE]]
    commit_manifest(stores[0], FOLDER, MANIFEST)  # a run that only chooses it again made nothing of it
    assert read_provenance(stores[0], provenance_path(FOLDER, refs[0].digest)) == HERE


def test_towers_and_checkpoints_keep_their_digest_whatever_made_them(tmp_path):
    digests = set()
    for number, maker in enumerate((None, HERE, THERE)):
        store = open_store(str(tmp_path / str(number)))
        for name, parts in TOWER_FOLDERS.items():
            for part in parts:
                (tmp_path / "local" / part).mkdir(parents=True, exist_ok=True)
                (tmp_path / "local" / part / "config.json").write_text("{}")
            commit_tower(store, "towers/t/0", name, tmp_path / "local", {})
        digests.add(commit_towers(store, "towers/t/0", {"format": 1}, maker).digest)
        digest = read_towers(store, "towers/t/0").digest
        assert provenance_of(store, f"towers/t/0/MANIFEST.{digest[:12]}.json") == ([maker] if maker else [])
    assert len(digests) == 1

    def done(*files: str) -> CheckpointDone:
        records = {name: FileRecord(sha256="f" * 64, bytes=1) for name in files}
        return CheckpointDone(
            samples=8, steps=1, attempt=1, optimizer_step=1, config={}, training={}, parameters={}, files=records,
            specs={}, null="zeros",
        )  # fmt: skip

    rank = "rank-000-of-001.safetensors"
    with_it = done(rank, provenance_file(1))
    assert with_it.digest == done(rank).digest and with_it.rank_files == [rank]
    store = open_store(str(tmp_path / "checkpoint"))
    put_provenance(store, f"c/{provenance_file(1)}", THERE)
    store.put_json("c/DONE.json", with_it.model_dump(mode="json"))
    assert provenance_of(store, "c/DONE.json") == [THERE]


def test_what_was_made_before_provenance_was_kept_loads_and_names_nobody(tmp_path):
    store = open_store(str(tmp_path))
    ref = commit_manifest(store, FOLDER, MANIFEST)
    assert read_manifest(store, FOLDER, ref.digest) == MANIFEST
    assert provenance_of(store, ref.path) == []
    store.put_json("scores.json", {"scores": []})
    store.put("DONE.json", b"{")
    assert provenance_of(store, "scores.json") == provenance_of(store, "DONE.json") == []
    store.put_json("p.json", {"version": "9", "of a later version": 1})
    assert read_provenance(store, "p.json") == Provenance(version="9")


def test_this_process_is_named_by_the_commit_and_the_installed_lock_and_tells_nothing_of_the_machine_or_its_user():
    made_by = provenance(devices=2)
    lock = module.PROJECT / "infra" / "locks" / f"{made_by.lock.split()[0]}.txt"
    assert made_by.lock.split()[1] == hashlib.sha256(lock.read_bytes()).hexdigest()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=module.PROJECT, capture_output=True, text=True, check=False)
    assert made_by.commit == (head.stdout.strip() or None)
    said = json.dumps(made_by.model_dump())
    assert made_by.device and made_by.devices == 2 and made_by.version[0].isdigit()
    for secret in (socket.gethostname(), str(module.PROJECT), f"/{getpass.getuser()}/"):
        assert secret not in said


def test_a_repository_around_an_installation_is_not_the_projects_own(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(module, "PROJECT", tmp_path / "inside")
    assert module._checkout() == (None, False)
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert module._checkout() == (None, False)


def test_packages_that_are_not_as_the_lock_has_them_are_named():
    lock = f"# comment\npydantic=={module._installed_version('pydantic')}\ntorch==0.0.1\nnot-a-package==1\n"
    digest, other = module._compare_with_lock(lock)
    assert digest == hashlib.sha256(lock.encode()).hexdigest()
    assert [name.split()[0] for name in other] == ["torch", "not-a-package"]
