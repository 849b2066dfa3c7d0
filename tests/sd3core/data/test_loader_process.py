"""A loader in a process of its own: bit by bit the batches of one in the rank's, its errors, and no end that leaves anything."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import small_shards as made
import torch

from sd3core.data.loader_process import LoaderLost, LoaderProcess, SharedBuffer, _portable
from sd3core.data.loader_settings import LoaderSettings, open_loader
from sd3core.data.manifest import ManifestRef, commit_manifest
from sd3core.data.uncaptioned import record_uncaptioned
from sd3core.errors import DataError, StoreError

WAIT_S = 20.0


def settings_of(store, folder: Path, **changes) -> LoaderSettings:
    latents, text = (commit_manifest(store, m.folder, m) for m in made.write_data_set(store))
    record_uncaptioned(store, latents, text)
    fields = {"latents": latents, "text": text, "clip_tokens": made.CLIP_TOKENS, "t5_tokens": made.T5_TOKENS}
    fields |= {"seed": 11, "original_fraction": 0.5, "global_batch": 12, "micro_batch": 3, "steps": 40}
    fields |= {"rank": 1, "world": 2, "cache_folder": folder / "cache", "cache_bytes": 1e3, "read_ahead_bytes": 1e8}
    return LoaderSettings(store, **fields | changes)


def assert_same(batch, other) -> None:
    assert batch.keys == other.keys and batch.bucket == other.bucket
    assert np.array_equal(batch.sample_ids, other.sample_ids) and np.array_equal(batch.epochs, other.epochs)
    assert batch.latent.dtype == other.latent.dtype and torch.equal(batch.latent, other.latent)
    assert batch.text.tensors.keys() == other.text.tensors.keys()
    for name, tensor in batch.text.tensors.items():
        assert tensor.dtype == other.text.tensors[name].dtype and torch.equal(tensor, other.text.tensors[name]), name


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(what, within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def open_buffers() -> int:
    """Of batches, in this process."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:batch")
    return found


def test_batches_samples_warnings_and_errors_are_those_of_a_loader_in_the_rank(store, tmp_path):
    """In order, after a jump, in parts, and of named samples; a damaged tar is told in the same words and can be mended."""
    settings = settings_of(store, tmp_path)
    inside, warnings = open_loader(replace(settings, cache_folder=tmp_path / "inside"))
    beside = LoaderProcess(settings)
    assert beside.warnings == warnings and "images have no caption" in warnings[0]
    held = [beside.batch(0, 0)]
    for step, part in [(step, part) for step in (0, 1, 2, 9, 10, 3) for part in range(2)]:
        held.append(beside.batch(step, part))
        assert_same(held[-1], inside.batch(step, part))
    assert_same(held[0], inside.batch(0, 0))  # a batch stays what it was while others come
    wanted = [(1, "image-1-003"), (0, "image-0-002"), (2, "image-2-006"), (9, "none")]
    for batch, other in zip(beside.samples(wanted), inside.samples(wanted), strict=True):
        assert_same(batch, other)
    assert beside.samples([]) == []

    libraries = Path(f"/proc/{beside.pid}/maps").read_text()
    assert "numpy" in libraries and "torch" not in libraries
    path = f"latents/{made.shard_stem(0, made.parts_digest('latents', '0'))}.tar"
    good = store.get(path)
    store.put(path, b"\0" * len(good))
    told = []
    for loader in (beside, open_loader(replace(settings, cache_folder=tmp_path / "new"))[0]):
        with pytest.raises(DataError) as error:
            [loader.batch(step, 0) for step in range(20, 40)]
        told.append(str(error.value))
    assert told[0] == told[1] and f"{path}: its bytes are not those of its manifest" in told[0]
    store.put(path, good)
    assert_same(beside.batch(20, 1), inside.batch(20, 1))

    pid = beside.pid
    beside.close()
    assert is_gone(pid)
    assert open_buffers() == len([*held, batch])  # each as long as somebody holds it
    del held, batch
    assert open_buffers() == 0


def test_what_cannot_be_opened_is_told_in_the_same_words(file_store, tmp_path):
    settings = settings_of(file_store, tmp_path)
    wrong = replace(settings, latents=ManifestRef(folder="latents", digest="f" * 64))
    told = []
    for opened in (open_loader, LoaderProcess):
        with pytest.raises(DataError) as error:
            opened(wrong)
        told.append(str(error.value))
    assert told[0] == told[1] and "\n" not in told[0]


def test_its_death_is_one_line_and_the_next_one_goes_on(file_store, tmp_path):
    settings = settings_of(file_store, tmp_path)
    beside = LoaderProcess(settings)
    first = beside.batch(0, 0)
    os.kill(beside.pid, signal.SIGKILL)
    with pytest.raises(
        LoaderLost, match="^the loader's process of rank 1 was ended by SIGKILL; where memory has run out"
    ):
        [beside.batch(step, 0) for step in range(3)]
    assert is_gone(beside.pid)
    inside, _ = open_loader(settings)
    assert_same(first, inside.batch(0, 0))  # what was handed over stays


RANK = """
import os, pickle, sys, time
from sd3core.data.loader_process import LoaderProcess
with open(sys.argv[1], "rb") as file:
    loader = LoaderProcess(pickle.load(file))
layouts, files = loader._ask(("packed", 0, 0))  # as `batch`, without torch
if sys.argv[2] == "copied" and os.fork() == 0:
    time.sleep(600)
print(loader.pid, flush=True)
time.sleep(600)
"""


def started_rank(settings: LoaderSettings, folder: Path, copied: str = "") -> tuple[subprocess.Popen, int]:
    """A process that has opened a loader, and the loader's; "copied": another process has all that the rank has open."""
    (folder / "settings").write_bytes(pickle.dumps(settings))
    command = [sys.executable, "-c", RANK, str(folder / "settings"), copied]
    pipe = subprocess.PIPE
    rank = subprocess.Popen(command, stdout=pipe, stderr=pipe, start_new_session=True, text=True)
    return rank, int(rank.stdout.readline())


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_its_rank_and_leaves_nothing(file_store, tmp_path, end):
    """Killed, or by Ctrl-C, which goes to all of a terminal's processes: only the rank says something."""
    shared = set(os.listdir("/dev/shm"))
    rank, pid = started_rank(settings_of(file_store, tmp_path), tmp_path)
    assert psutil.Process(pid).ppid() == rank.pid
    os.killpg(rank.pid, end)
    _, said = rank.communicate(timeout=WAIT_S)
    wait_until(lambda: is_gone(pid))
    assert said.count("Traceback") == (end == signal.SIGINT) and "loader_process" not in said
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if "batch" in name}


def test_it_ends_with_its_rank_though_a_copy_of_it_lives_on(file_store, tmp_path):
    rank, pid = started_rank(settings_of(file_store, tmp_path), tmp_path, "copied")
    os.kill(rank.pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid))
    os.killpg(rank.pid, signal.SIGKILL)
    rank.communicate(timeout=WAIT_S)


def test_errors_travel_with_their_words():
    assert isinstance(_portable(StoreError("away")), StoreError)

    class Unheard(Exception):
        pass

    try:
        raise Unheard("of it")
    except Unheard as error:
        portable = _portable(error)
    assert str(portable) == "Unheard: of it" and "in the loader's process:\nTraceback" in portable.__notes__[0]
    assert portable.__notes__[0].endswith("Unheard: of it")


def test_a_buffer_is_zeros_where_nothing_was_written_and_goes_with_its_file():
    before, buffer = open_buffers(), SharedBuffer(10)
    buffer.write(3, memoryview(b"abc"))
    assert os.pread(buffer.file, 20, 0) == b"\0\0\0abc\0\0\0\0"
    assert open_buffers() == before + 1
    del buffer
    assert open_buffers() == before
