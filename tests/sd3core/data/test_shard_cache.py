"""The local shard cache: bounded, checked at every read, shared by processes; a file store is read in place."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time

import pytest

from sd3core.data.shard_cache import STALE_PARTIAL_S, ShardCache
from sd3core.data.store import open_store
from sd3core.errors import DataError, StoreError
from sd3core.files.whole_output import PARTIAL


def _put(store, name: str, size: int = 1000) -> tuple[str, str]:
    data = name.encode() * size
    store.put(f"{name}.tar", data[:size])
    return f"{name}.tar", hashlib.sha256(data[:size]).hexdigest()


@pytest.fixture
def s3_store(s3_bucket):
    return open_store(f"s3://{s3_bucket}/prefix")


def _counting(store):
    """The store, and how often it was asked for each object."""
    asked, real = [], store.get
    store.get = lambda path: (asked.append(path), real(path))[1]
    return asked


def _names(cache) -> set[str]:
    return {entry.name for entry in cache.folder.iterdir() if not entry.name.startswith(".")}


def test_fetched_once_and_read_again(s3_store, tmp_path):
    shard, asked = _put(s3_store, "a"), _counting(s3_store)
    cache = ShardCache(s3_store, tmp_path / "deep/cache", 10_000)
    assert cache.read(*shard) == cache.read(*shard) == b"a" * 1000 and len(asked) == 1
    assert ShardCache(s3_store, tmp_path / "deep/cache", 10_000).read(*shard) and len(asked) == 1


def test_the_ones_read_longest_ago_make_room(s3_store, tmp_path):
    cache = ShardCache(s3_store, tmp_path / "cache", 3000)
    shards = [_put(s3_store, name) for name in "abcd"]
    for age, shard in zip((30, 20, 10), shards[:3], strict=True):
        cache.read(*shard)
        os.utime(cache.folder / shard[1], (time.time() - age,) * 2)
    cache.read(*shards[0])  # the oldest is used again
    cache.read(*shards[3])
    assert _names(cache) == {shards[n][1] for n in (0, 2, 3)}
    large = _put(s3_store, "large", 5000)  # larger than all of it: kept alone, for the next rank
    assert len(cache.read(*large)) == 5000 and _names(cache) == {large[1]}


def test_a_damaged_copy_is_fetched_again(s3_store, tmp_path):
    shard, asked = _put(s3_store, "a"), _counting(s3_store)
    cache = ShardCache(s3_store, tmp_path / "cache", 10_000)
    cache.read(*shard)
    (cache.folder / shard[1]).write_bytes(b"a" * 400)
    assert cache.read(*shard) == b"a" * 1000 and len(asked) == 2
    assert (cache.folder / shard[1]).stat().st_size == 1000


def test_a_damaged_object_is_refused_and_not_kept(store, tmp_path):
    path, digest = _put(store, "a")
    cache = ShardCache(store, tmp_path / "cache", 10_000)
    with pytest.raises(DataError, match="a.tar: its bytes are not those of its manifest"):
        cache.read(path, "0" * 64)
    with pytest.raises(DataError, match="b.tar: its manifest names it and it is gone"):
        cache.read("b.tar", digest)
    assert cache.read(path, digest) == b"a" * 1000


def test_a_file_store_is_read_in_place_and_checked(file_store, tmp_path):
    path, digest = _put(file_store, "a")
    cache = ShardCache(file_store, tmp_path / "cache", 10_000)
    assert cache.read(path, digest) == b"a" * 1000
    file_store.put(path, b"b" * 1000)
    with pytest.raises(DataError, match="its bytes are not those"):
        cache.read(path, digest)
    assert not cache.folder.exists()


def test_threads_fetch_a_shard_once(s3_store, tmp_path):
    shard, asked = _put(s3_store, "a", 100_000), _counting(s3_store)
    caches = [ShardCache(s3_store, tmp_path / "cache", 1e6) for _ in range(6)]
    threads = [threading.Thread(target=cache.read, args=shard) for cache in caches]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(asked) == 1


def _read_many(url: str, folder, shards, failures) -> None:
    cache = ShardCache(open_store(url), folder, 2500)  # too small for all: others delete what this one wants to read
    for turn in range(30):
        path, digest = shards[(turn * 7 + os.getpid()) % len(shards)]
        data = cache.read(path, digest)
        if hashlib.sha256(data).hexdigest() != digest:
            failures.value += 1


def test_processes_share_a_folder_that_is_too_small(s3_store, tmp_path):
    shards = [_put(s3_store, name) for name in "abcde"]
    context = multiprocessing.get_context("spawn")
    failures = context.Value("i", 0)
    processes = [
        context.Process(target=_read_many, args=(s3_store.url, tmp_path / "cache", shards, failures)) for _ in range(2)
    ]
    [process.start() for process in processes]
    [process.join(60) for process in processes]
    assert [process.exitcode for process in processes] == [0, 0] and failures.value == 0
    assert sum(f.stat().st_size for f in (tmp_path / "cache").iterdir()) <= 3000 + 1000


def test_what_killed_processes_left_is_removed(s3_store, tmp_path):
    cache = ShardCache(s3_store, tmp_path / "cache", 10_000)
    cache.read(*_put(s3_store, "a"))
    old, new = cache.folder / f"{PARTIAL}old", cache.folder / f"{PARTIAL}new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - STALE_PARTIAL_S - 10,) * 2)
    cache.read(*_put(s3_store, "b"))
    assert not old.exists() and new.exists()


def test_a_full_disk_is_one_line(s3_store, tmp_path, monkeypatch):
    shard = _put(s3_store, "a")

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache = ShardCache(s3_store, tmp_path / "cache", 10_000)
    with pytest.raises(StoreError, match="shard cache .*: No space left on device; lower compute.cache_gb"):
        cache.read(*shard)
    assert _names(cache) == set() and not list(cache.folder.glob(f"{PARTIAL}*"))
