"""Rows come by few ranges, are hashed once on a machine, and are kept within bounds; what is damaged is never handed on."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time

import numpy as np
import pyarrow as pa
import pytest

from sd3core.data import shard_cache
from sd3core.data.shard_cache import STALE_PARTIAL_S, WASTE, ShardCache, StoredRow, boot, spans_of
from sd3core.data.shards import Sample, read_shard_index, write_shard
from sd3core.data.store import open_store
from sd3core.errors import DataError, StoreError
from sd3core.files.whole_output import PARTIAL

STEM = "00000.0123456789ab"


def _content(number: int, size: int = 1500) -> bytes:
    return np.random.default_rng(number).bytes(size + number)


def _put(store, folder: str = "a", rows: int = 20) -> list[StoredRow]:
    record = write_shard(store, folder, STEM, [Sample(f"k{n}", {"bin": _content(n)}) for n in range(rows)], [])
    index = read_shard_index(store, folder, STEM).to_pylist()
    path = f"{folder}/{STEM}.tar"
    return [
        StoredRow(path, record.digest, row["offset"], row["length"], hashlib.sha256(_content(number)).digest())
        for number, row in enumerate(index)
    ]


@pytest.fixture
def s3_store(s3_bucket):
    return open_store(f"s3://{s3_bucket}/prefix")


@pytest.fixture
def hashed(monkeypatch):
    """How many times something was hashed by the cache."""
    calls, real = [], hashlib.sha256
    fake = type("hashes", (), {"sha256": staticmethod(lambda data=b"": (calls.append(len(data)), real(data))[1])})
    monkeypatch.setattr(shard_cache, "hashlib", fake)
    return lambda: sum(length > 500 for length in calls)


def _counting(store):
    """The ranges that the store is asked for."""
    asked, real = [], store.get_range
    store.get_range = lambda *range_: (asked.append(range_), real(*range_))[1]
    return asked


def _names(cache) -> set[str]:
    return {entry.name for entry in cache.folder.iterdir() if not entry.name.startswith(".")}


def test_rows_come_in_the_order_asked_for_by_few_requests(store, tmp_path):
    rows, asked = _put(store), _counting(store)
    cache = ShardCache(store, tmp_path / "cache", 1e6)
    wanted = [7, 3, 4, 5, 3, 6, 19]
    assert cache.read([rows[n] for n in wanted]) == [_content(n) for n in wanted]
    assert sorted(asked) == [
        (rows[0].path, rows[3].offset, rows[8].offset - rows[3].offset),
        (rows[0].path, rows[19].offset, rows[19].length),
    ]
    assert cache.read([]) == []


@pytest.mark.parametrize("seed", range(10))
def test_a_request_has_few_bytes_that_nobody_wants(seed):
    rng = np.random.default_rng(seed)
    ends = np.cumsum(rng.integers(1, 3000, 300))
    rows = [
        StoredRow("p", "d", int(end - length), int(length), b"")
        for end, length in zip(ends, np.diff(ends, prepend=0), strict=True)
        if rng.random() < rng.choice([0.2, 0.9])
    ]
    rng.shuffle(rows)
    spans = spans_of(rows)
    assert sorted((row for span in spans for row in span), key=lambda row: row.offset) == [
        row for span in spans for row in span
    ]
    for span in spans:
        size = span[-1].offset + span[-1].length - span[0].offset
        assert size - sum(row.length for row in span) <= WASTE * size
    assert len(spans) < len(rows)


def test_a_store_elsewhere_is_asked_once_for_what_is_kept(s3_store, tmp_path, hashed):
    rows, asked = _put(s3_store), _counting(s3_store)
    for _ in range(3):  # other processes of the machine too
        cache = ShardCache(s3_store, tmp_path / "deep/cache", 1e6)
        assert cache.read(rows[:5], keep=True) == [_content(n) for n in range(5)]
        assert len(asked) == 1 and hashed() == 5
    assert cache.read(rows[3:7], keep=True) == [_content(n) for n in range(3, 7)]
    assert asked[1:] == [(rows[0].path, rows[5].offset, rows[7].offset - rows[5].offset)] and hashed() == 7
    [name] = _names(cache)
    assert (cache.folder / name).stat().st_blocks * 512 < 12 * 4096  # sparse: what was not fetched takes no room
    assert ShardCache(s3_store, tmp_path / "other", 1e6).read(rows[:1]) == [_content(0)]
    assert not (tmp_path / "other").exists()  # nothing is kept unasked


def test_a_row_that_was_being_written_is_fetched_again(s3_store, tmp_path):
    """A killed writer leaves a row without its header; a machine that was started again keeps nothing of before."""
    rows, asked = _put(s3_store), _counting(s3_store)
    cache = ShardCache(s3_store, tmp_path / "cache", 1e6)
    cache.read(rows[:2], keep=True)
    [name] = _names(cache)
    with (cache.folder / name).open("r+b") as file:
        file.write(bytes(512))
    assert cache.read(rows[:2], keep=True) == [_content(0), _content(1)] and len(asked) == 2
    os.rename(cache.folder / name, cache.folder / f"{name[:-8]}00000000")
    assert cache.read(rows[:1], keep=True) == [_content(0)] and len(asked) == 3


def test_a_file_store_is_read_in_place_and_hashed_once(file_store, tmp_path, hashed):
    rows = _put(file_store)
    for _ in range(3):
        assert ShardCache(file_store, tmp_path / "cache", 1e6).read(rows, keep=True) == [_content(n) for n in range(20)]
        assert hashed() == 20
    assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) < 1000
    data = bytearray(file_store.get(rows[0].path))
    data[rows[4].offset + 600] ^= 1
    file_store.put(rows[0].path, bytes(data))  # another file now: its rows are hashed again
    with pytest.raises(DataError, match=f"a/{STEM}.tar: its bytes are not those of its manifest; delete {STEM}.done"):
        ShardCache(file_store, tmp_path / "cache", 1e6).read(rows)
    assert ShardCache(file_store, tmp_path / "cache", 1e6).read(rows[:4]) == [_content(n) for n in range(4)]


def test_a_folder_that_cannot_be_written_to_only_costs_time(file_store, tmp_path, hashed):
    rows = _put(file_store)
    (tmp_path / "cache").write_text("a file where the folder should be")
    for times in (1, 2):
        assert ShardCache(file_store, tmp_path / "cache", 1e6).read(rows)
        assert hashed() == 20 * times


def test_what_is_gone_damaged_or_short_is_named(store, tmp_path):
    rows = _put(store)
    good = store.get(rows[0].path)
    cache = ShardCache(store, tmp_path / "cache", 1e6)
    for damage in (good[:700] + b"?" + good[701:], bytes(len(good)), good[:1024], b"?" * len(good)):
        store.put(rows[0].path, damage)
        with pytest.raises(DataError, match=f"a/{STEM}.tar: its bytes are not those of its manifest"):
            cache.read(rows, keep=True)
    store.delete(rows[0].path)
    with pytest.raises(DataError, match=f"a/{STEM}.tar: its manifest names it and it is gone"):
        cache.read(rows, keep=True)
    store.put(rows[0].path, good)
    assert cache.read(rows, keep=True) == [_content(n) for n in range(20)]  # nothing damaged was kept


def _table(rows: int = 10) -> pa.Table:
    return pa.table({"a": np.arange(rows), "b": [str(n) for n in range(rows)]}).replace_schema_metadata({"k": "v"})


def test_a_table_is_made_once_on_a_machine(file_store, tmp_path):
    made = []

    def make():
        made.append(1)
        time.sleep(0.05)
        return _table()

    caches = [ShardCache(file_store, tmp_path / "cache", 1e6) for _ in range(6)]
    found = []
    threads = [threading.Thread(target=lambda c=c: found.append(c.table("rows-0", make))) for c in caches]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(made) == 1 and len(found) == 6
    assert all(table.equals(_table()) and table.schema.metadata == {b"k": b"v"} for table in found)
    assert pa.total_allocated_bytes() < 1e6  # mapped, not read
    (caches[0].folder / f"rows-0-{boot()}").write_bytes(b"ARROW1")
    assert caches[0].table("rows-0", make).equals(_table()) and len(made) == 2


def test_what_was_not_used_for_longest_makes_room(file_store, tmp_path):
    cache = ShardCache(file_store, tmp_path / "cache", 200_000)
    for number in range(3):
        cache.table(f"rows-{number}", lambda: _table(3000))  # 50 kB each
        os.utime(cache.folder / f"rows-{number}-{boot()}", (time.time() - 30 + number,) * 2)
    cache.table("rows-0", _table)  # the oldest is used again
    for name in ("rows-3", "rows-4"):
        assert cache.table(name, lambda: _table(3000)).num_rows == 3000
    assert f"rows-0-{boot()}" in _names(cache) and f"rows-1-{boot()}" not in _names(cache)
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 200_000
    assert cache.table("rows-large", lambda: _table(30_000)).num_rows == 30_000  # more than there is room for at all


def _read_many(url: str, folder, rows, failures) -> None:
    cache = ShardCache(open_store(url), folder, 30_000)  # too small for all: others delete what this one wants to read
    for turn in range(60):
        number = (turn * 7 + os.getpid()) % len(rows)
        if cache.read([rows[number]], keep=True) != [_content(number % 20)]:
            failures.value += 1


def test_processes_share_a_folder_that_is_too_small(s3_store, tmp_path):
    rows = [row for folder in "abc" for row in _put(s3_store, folder)]
    rows = [StoredRow(r.path, f"{r.path[0]}{r.digest[1:]}", r.offset, r.length, r.sha256) for r in rows]
    context = multiprocessing.get_context("spawn")
    failures = context.Value("i", 0)
    processes = [
        context.Process(target=_read_many, args=(s3_store.url, tmp_path / "cache", rows, failures)) for _ in range(2)
    ]
    [process.start() for process in processes]
    [process.join(60) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0] and failures.value == 0
    assert sum(f.stat().st_blocks * 512 for f in (tmp_path / "cache").iterdir()) <= 30_000 + 2 * 4096


def test_what_killed_processes_left_is_removed(file_store, tmp_path):
    cache = ShardCache(file_store, tmp_path / "cache", 10_000)
    cache.table("rows-0", _table)
    old, new = cache.folder / f"{PARTIAL}old", cache.folder / f"{PARTIAL}new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - STALE_PARTIAL_S - 10,) * 2)
    cache.table("rows-1", _table)
    assert not old.exists() and new.exists()


def test_a_full_disk_is_one_line(s3_store, tmp_path, monkeypatch):
    rows = _put(s3_store)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(os, "pwrite", full)
    cache = ShardCache(s3_store, tmp_path / "cache", 10_000)
    for attempt in (lambda: cache.read(rows, keep=True), lambda: cache.table("rows-0", _table)):
        with pytest.raises(StoreError, match="shard cache .*: No space left on device; lower compute.cache_gb"):
            attempt()
    assert not [name for name in _names(cache) if name.startswith("rows")] and not [*cache.folder.glob(f"{PARTIAL}*")]
