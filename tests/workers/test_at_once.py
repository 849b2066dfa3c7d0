"""Several shards at once in one actor: as fast as the slower side, the oldest first, within so many bytes."""

from __future__ import annotations

import io
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pyarrow as pa
import pytest
import torch
from PIL import Image

from sd3core.data.images import PixelRules
from sd3core.data.shards import Sample, write_shard
from sd3core.data.size_rule import SizeRule
from sd3core.data.store import open_store
from sd3core.errors import DataError
from workers.at_once import SHARDS_AT_ONCE, ShardsAtOnce
from workers.encode_latents import LatentsSource, LatentsWorker
from workers.inputs import InputShard
from workers.shard_stage import ShardTask

ROWS, BATCH, SHARDS = 16, 4, 16
STORE_S = 0.008  # that every reading and writing of an object takes


class WaitingStore:
    """A store at a distance: each object that comes or goes takes its time, and no CPU."""

    def __init__(self, store) -> None:
        self.store = store

    def __getattr__(self, name):
        found = getattr(self.store, name)
        return self._slowly(found) if name in ("get", "put", "put_file") else found

    def _slowly(self, work):
        def slow(*arguments):
            time.sleep(STORE_S)
            return work(*arguments)

        return slow


class WaitingAutoencoder:
    """Takes so many seconds for a batch, and no CPU; notes when it was at work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode(self, images):
        time.sleep(self.seconds)
        return torch.zeros(len(images), 16, 4, 4)


def latents_worker(store, seconds: float, most_bytes: float = 1e9) -> LatentsWorker:
    made = LatentsWorker.__new__(LatentsWorker)  # without towers: the autoencoder is given
    made.store, made.batch, made.threads, made.rules = WaitingStore(store), BATCH, 1, PixelRules(10**6)
    made.dtype, made.autoencoder = torch.float32, WaitingAutoencoder(seconds)
    made.at_once = ShardsAtOnce(most_bytes)
    return made


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("store")))
    sink = io.BytesIO()
    Image.new("RGB", (32, 32), (90, 90, 90)).save(sink, "PNG")
    samples = [Sample(f"k{row}", {"png": sink.getvalue()}, {"split": "train"}) for row in range(ROWS)]
    record = write_shard(store, "raw", "00000.0123456789ab", samples, [], pa.schema([("split", pa.string())]))
    return store, InputShard("raw", record.stem, record.digest, record.rows, None, record.bytes)


def tasks(raw, folder: str, count: int) -> list[ShardTask]:
    return [
        ShardTask(n, raw.digest[:12], folder, raw.rows, LatentsSource(raw, SizeRule(((32, 32),)))) for n in range(count)
    ]


def finish_times(worker, todo: list[ShardTask], threads: int) -> list[float]:
    def timed(task) -> float:
        worker(task)
        return time.monotonic()

    with ThreadPoolExecutor(threads) as executor:
        return sorted(executor.map(timed, todo))


def seconds_a_shard(times: list[float], first: int) -> float:
    """Between the first shards, in which nothing can overlap yet, and the last."""
    return (times[-1] - times[first]) / (len(times) - 1 - first)


@pytest.mark.parametrize("encoder_s", [0.015, 0.03])  # a batch: about what all else takes, and twice that
def test_an_actor_is_as_fast_as_the_slower_of_its_encoder_and_all_else(raw, encoder_s):
    """One after the other it would take the sum of both. The best of three: the machine has other work too."""
    store, shard = raw
    rates = []
    for attempt in range(3):
        without_encoder = finish_times(latents_worker(store, 0), tasks(shard, f"else-{encoder_s}-{attempt}", 6), 1)
        slower = max(seconds_a_shard(without_encoder, 0), ROWS / BATCH * encoder_s)
        worker = latents_worker(store, encoder_s)
        times = finish_times(worker, tasks(shard, f"both-{encoder_s}-{attempt}", SHARDS), SHARDS_AT_ONCE)
        rates.append(slower / seconds_a_shard(times, SHARDS_AT_ONCE - 1))
        if rates[-1] >= 0.9:
            return
    raise AssertionError(f"{rates} of the slower side's rate")


def test_shards_made_together_are_those_made_one_by_one(raw):
    store, shard = raw
    for folder, threads in (("together", SHARDS_AT_ONCE), ("apart", 1)):
        finish_times(latents_worker(store, 0.001, most_bytes=1), tasks(shard, folder, 6), threads)
    one, other = (
        {e.path.rpartition("/")[2]: store.get(e.path) for e in store.list(of)} for of in ("together", "apart")
    )
    assert one == other and len(one) == 18


def test_the_oldest_shard_has_the_encoder_first():
    shards, order, waits = ShardsAtOnce(1), [], []

    def encode(turn) -> None:
        with turn.encoding():
            order.append(turn.place)

    with shards.shard("a") as a, shards.shard("b") as b, shards.shard("c") as c:
        with b.encoding():  # nobody older wants it
            for turn in (c, a):
                waits.append(Thread(target=encode, args=(turn,)))
                waits[-1].start()
            while not (a.wants_encoder and c.wants_encoder):
                time.sleep(0.001)
        for thread in waits:
            thread.join(5)
    assert order == ["a", "c"]


def test_what_is_read_ahead_is_bounded_in_bytes_and_the_oldest_always_goes_on():
    shards, held = ShardsAtOnce(10), Event()

    def ahead(turn) -> None:
        turn.hold(4)
        held.set()

    with shards.shard("b") as b:
        with shards.shard("c") as c:
            b.hold(9)
            waits = Thread(target=ahead, args=(c,))
            waits.start()
            assert not held.wait(0.1)
            b.hold(90)  # the oldest: more than there is
            b.let_go(92)
            assert not held.wait(0.1)
            b.let_go(1)
            assert held.wait(5) and shards.held == 10
            waits.join(5)
    assert shards.held == 0 and not shards.turns


def test_a_shard_that_fails_frees_what_it_held():
    shards = ShardsAtOnce(10)
    with pytest.raises(DataError), shards.shard("a") as a:
        a.hold(20)
        with a.encoding():
            raise DataError("a")
    with shards.shard("b") as b:
        b.hold(5)
        with b.encoding():
            assert shards.held == 5 and shards.progress == {"b": 0}
