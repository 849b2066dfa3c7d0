from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import pytest
import ray

from sd3core.data.manifest import read_manifest
from sd3core.data.provenance import device_kind, provenance_of
from sd3core.data.shards import FailedRow, Sample, write_shard
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.progress import ignore_progress
from sd3core.recipe import Compute
from workers.shard_stage import MadeShard, ShardStage, ShardTask, run_shard_stage, run_shard_stages
from workers.stage import NOTHING_TO_DO, StageFailed, recall_stage

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]
COMPUTE = Compute(actors=1, object_store_mb=80)


class Worker:
    """Writes a shard of `rows` rows and one failed row, and counts its attempts in the store."""

    def __init__(self, url: str, poison: tuple[int, ...] = (), die_once_at: int | None = None) -> None:
        self.store, self.poison, self.die_once_at = open_store(url), poison, die_once_at

    def __call__(self, task):
        mark = f"attempts/{task.folder}/{task.stem}"
        attempt = self.store.get_json(mark) + 1 if self.store.exists(mark) else 1
        self.store.put_json(mark, attempt)
        if task.number in self.poison:
            raise DataError(f"row {task.number} is poison")
        if task.number == self.die_once_at and attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        self.store.put(f"{task.folder}/NULL.safetensors", b"null")
        samples = [Sample(f"{task.stem[:5]}-{i}", {"txt": b"x" * i}) for i in range(task.rows)]
        return MadeShard(
            write_shard(self.store, task.folder, task.stem, samples, [FailedRow(key="k", reason="too small")])
        )


def a_stage(t5_tokens=16, shards=4, name="text", inputs=None, needs=("NULL.safetensors",)):
    fields = {"format": 1, "text": {"t5_tokens": t5_tokens}}
    folder = f"datasets/d/text/{t5_tokens:012d}"
    tasks = [ShardTask(i, f"{i:012x}", folder, rows=3) for i in range(shards)]
    return ShardStage(name, "text", folder, fields, inputs or {"raw": "a" * 64}, tasks, needs)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def run(store, stage, run="r", report=ignore_progress, **worker):
    return run_shard_stage(store, run, stage, Worker, {"url": store.url, **worker}, COMPUTE, report)


def attempts(store):
    return {entry.path.rpartition("/")[2][:5]: store.get_json(entry.path) for entry in store.list("attempts")}


def test_first_run_then_nothing_to_do_then_only_what_is_missing(store):
    seen = []
    first = run(store, a_stage(), report=seen.append)
    assert (first.skipped, first.reason, first.made, first.done_before) == (False, "first run", 4, 0)
    assert first.rows == 12 and first.warnings == ["4 rows left out: too small: k, k, k and 1 more"]
    assert (seen[-1].done, seen[-1].total, seen[-1].note) == (12, 12, "shard 4/4")
    assert not [progress.warning for progress in seen if progress.warning]  # the end, with the totals, is near
    manifest = read_manifest(store, first.manifest.folder, first.manifest.digest)
    assert [entry.number for entry in manifest.shards] == [0, 1, 2, 3]
    (maker,) = provenance_of(store, first.manifest.path)
    assert (maker.device, maker.devices, maker.made) == (device_kind(), 1, 4) and maker.seconds >= 0

    again = run(store, a_stage())
    assert (again.skipped, again.reason, again.made, again.done_before) == (True, NOTHING_TO_DO, 0, 4)
    assert again.manifest == first.manifest

    store.delete(f"{manifest.folder}/{manifest.shards[2].stem}.done.json")
    third = run(store, a_stage())
    assert (third.skipped, third.reason, third.made) == (False, "1 of 4 shards was missing", 1)
    assert third.manifest == first.manifest  # the bytes are a function of the inputs
    assert attempts(store) == {"00000": 1, "00001": 1, "00002": 2, "00003": 1}

    store.delete(f"{manifest.folder}/NULL.safetensors")  # a lost file that the stage needs brings one shard back
    assert run(store, a_stage()).made == 1
    assert attempts(store)["00000"] == 2


def test_shards_that_were_made_again_before_a_kill_are_those_of_the_next_manifest(store):
    """`--from-stage` takes the markers; the killed attempt had made one shard, with other bytes than before."""
    first = run(store, a_stage())
    for entry in store.list(first.manifest.folder):
        if entry.path.endswith((".done.json", "/MANIFEST.json")):
            store.delete(entry.path)
    task = a_stage().tasks[0]
    made = Worker(store.url)(replace(task, rows=5)).record
    again = run(store, a_stage())
    manifest = read_manifest(store, first.manifest.folder, again.manifest.digest)
    assert (again.made, again.skipped, again.rows) == (3, False, 14)
    assert (manifest.shards[0].digest, manifest.shards[0].rows) == (made.digest, 5)


def test_a_changed_field_is_named_and_going_back_costs_nothing(store):
    first = run(store, a_stage(16))
    changed = run(store, a_stage(20))
    assert changed.reason == "text.t5_tokens: 16 -> 20; 4 of 4 shards were missing"
    back = run(store, a_stage(16))
    assert back.skipped and back.manifest == first.manifest
    assert recall_stage(store, "r", "text").digest == first.manifest.digest
    other = run(store, a_stage(16), run="other")
    assert other.skipped and other.manifest == first.manifest


def test_a_data_set_that_grows_and_one_that_shrinks_share_a_folder(store):
    small = run(store, a_stage(shards=2))
    grown = run(store, a_stage(shards=4, inputs={"raw": "b" * 64}), run="grown")
    assert (grown.made, grown.done_before, grown.reason) == (2, 2, "2 of 4 shards were missing")
    again = run(store, a_stage(shards=2))  # its manifest is no longer the newest, but it stands under its digest
    assert again.skipped and again.manifest == small.manifest
    assert read_manifest(store, small.manifest.folder).digest == small.manifest.digest
    assert set(attempts(store).values()) == {1}


@pytest.mark.parametrize("harm", ["copy gone", "copy altered", "newest altered", "newest cut short"])
def test_a_damaged_manifest_is_written_again_from_the_done_records(store, harm):
    first = run(store, a_stage())
    newest, copy = f"{first.manifest.folder}/MANIFEST.json", first.manifest.path
    whole = store.get(newest)
    if harm == "copy gone":
        store.delete(copy)
    else:
        altered = whole[:-10] if harm.endswith("short") else whole.replace(b'"rows": 3', b'"rows": 4')
        assert altered != whole
        store.put(copy if harm.startswith("copy") else newest, altered)
    again = run(store, a_stage())
    assert (again.made, again.skipped, again.manifest) == (0, False, first.manifest)
    assert again.reason == f"{store.uri(newest)} or its copy was damaged, and is written again"
    assert store.get(newest) == store.get(copy) == whole
    assert run(store, a_stage()).skipped and set(attempts(store).values()) == {1}


def test_poison_shards_are_named_after_all_others_are_done(store):
    with pytest.raises(
        StageFailed, match=r"text: 1 of 4 shards could not be made: .*00001.*row 1 is poison, 3 attempts"
    ):
        run(store, a_stage(), poison=(1,))
    assert recall_stage(store, "r", "text") is None
    mended = run(store, a_stage())
    assert (mended.made, mended.done_before, mended.reason) == (1, 3, "1 of 4 shards was missing")


def test_a_worker_killed_in_its_shard_costs_only_that_shard(store):
    result = run(store, a_stage(), die_once_at=2)
    assert result.made == 4 and result.rows == 12
    assert attempts(store) == {"00000": 1, "00001": 1, "00002": 2, "00003": 1}


def test_several_stages_share_workers_and_each_commits_its_manifest(store):
    stages = [a_stage(16, name="latents.pretrain"), a_stage(20, name="latents.finetune.0")]
    results = run_shard_stages(store, "r", stages, Worker, {"url": store.url}, COMPUTE, ignore_progress)
    assert [r.stage for r in results] == ["latents.pretrain", "latents.finetune.0"]
    assert [r.made for r in results] == [4, 4] and results[0].manifest.folder != results[1].manifest.folder
