"""The plan's promises, each held by counting: once an epoch, one bucket a step, pieces whole, from any step."""

from __future__ import annotations

import itertools
import time
from collections import Counter

import numpy as np
import pytest

from sd3core.data.training_plan import BucketReport, TrainingPlan, permute
from sd3core.data.unit_counts import UnitCounts, leave_out_small_buckets, small_buckets, small_buckets_warning
from sd3core.errors import DataError


def _counts(shards: int = 6, rows: int = 20, shares=(0.6, 0.3, 0.1)) -> UnitCounts:
    drawn = np.random.default_rng(0).multinomial(rows, shares, size=shards)
    return UnitCounts(drawn, tuple(f"b{n}" for n in range(len(shares))))


def _places(batch) -> list[tuple[int, int]]:
    return list(zip(batch.shard.tolist(), batch.row.tolist(), strict=True))


def _samples(plan: TrainingPlan, steps: int):
    """(bucket, epoch, (shard, row)) of every sample in order."""
    for batch in map(plan.batch, range(steps)):
        yield from zip(itertools.repeat(batch.bucket), batch.epoch.tolist(), _places(batch))


def _rows_of(counts: UnitCounts, code: int) -> set[tuple[int, int]]:
    return {(shard, row) for shard, rows in enumerate(counts.rows[:, code].tolist()) for row in range(rows)}


@pytest.mark.parametrize("piece_rows", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("global_batch", [1, 7, 8, 20, 64, 500])
@pytest.mark.parametrize("shards, rows, shares", [(6, 20, (0.6, 0.3, 0.1)), (1, 1, (1.0,)), (40, 3, (0.5, 0.5))])
def test_every_row_comes_exactly_once_in_every_epoch(shards, rows, shares, global_batch, piece_rows):
    counts = _counts(shards, rows, shares)
    plan = TrainingPlan(counts, 3, global_batch, piece_rows)
    seen = list(_samples(plan, 4000 // global_batch))
    assert len(set(seen)) == len(seen)  # (epoch, sample) never comes twice
    for code, bucket in enumerate(counts.buckets):
        epochs = [epoch for name, epoch, _ in seen if name == bucket]
        assert epochs == sorted(epochs)
        for epoch in range(epochs[-1] if epochs else 0):  # all but the last, which is under way
            found = Counter(sample for name, e, sample in seen if name == bucket and e == epoch)
            assert found == Counter(_rows_of(counts, code))


@pytest.mark.parametrize("seed", range(20))
def test_any_sizes_make_whole_epochs(seed):
    """Shards, rows, buckets, batch and pieces by chance: some shards and buckets have nothing."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 30), rng.integers(1, 6)
    rows = rng.integers(0, rng.integers(2, 30), shape) * (rng.random(shape) < 0.7)
    rows[rng.integers(shape[0]), rng.integers(shape[1])] += 1
    counts = UnitCounts(rows, tuple(f"b{n}" for n in range(shape[1])))
    plan = TrainingPlan(counts, seed, int(rng.integers(1, 50)), int(rng.integers(1, 12)))
    seen = list(_samples(plan, 3 * len(counts) // plan.global_batch + 3 * shape[1]))
    assert len(set(seen)) == len(seen)
    for code, bucket in enumerate(counts.buckets):
        last = max((epoch for name, epoch, _ in seen if name == bucket), default=0)
        for epoch in range(last):
            assert {sample for name, e, sample in seen if (name, e) == (bucket, epoch)} == _rows_of(counts, code)


def test_batches_are_of_one_bucket_and_interleaved_in_proportion():
    counts = _counts()
    plan = TrainingPlan(counts, seed=1, global_batch=8)
    given = np.zeros(3)
    shares = counts.rows.sum(axis=0) / len(counts)
    for step in range(600):
        batch = plan.batch(step)
        assert len(batch.shard) == len(batch.row) == len(batch.epoch) == 8
        code = counts.buckets.index(batch.bucket)
        assert (batch.row < counts.rows[batch.shard, code]).all()
        assert plan.batches_before(step) == dict(enumerate(given.tolist()))
        given[code] += 1
        assert np.abs(given - shares * (step + 1)).max() < 3  # at every moment, not only in the end


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.6, 0.3, 0.1), (0.001, 0.999), tuple([1 / 9] * 9)])
def test_any_step_is_reached_alone(shares):
    counts = _counts(8, 300, shares)
    plan = TrainingPlan(counts, seed=5, global_batch=16)
    before = Counter()
    for step in range(1500):  # in order, each bucket's batches are numbered without a gap
        code, number = plan.bucket_of(step)
        assert number == before[code]
        before[code] += 1
    alone = TrainingPlan(counts, seed=5, global_batch=16).batch(1499)
    inline = plan.batch(1499)
    for name in ("shard", "row", "epoch"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(inline, name))
    assert plan.bucket_of(10**9)[1] <= 10**9  # and far ones cost no more


@pytest.mark.parametrize("world", [1, 2, 3, 8, 48])
def test_ranks_have_slices_of_the_same_batch(world):
    plan = TrainingPlan(_counts(9, 50), seed=2, global_batch=48, piece_rows=4)
    for step in (0, 3, 40, 10**7):
        whole, share = plan.batch(step), 48 // world
        parts = [plan.batch(step, slice(rank * share, (rank + 1) * share)) for rank in range(world)]
        assert [place for part in parts for place in _places(part)] == _places(whole) and {
            part.bucket for part in parts
        } == {whole.bucket}


@pytest.mark.parametrize("piece_rows", [1, 4, 8])
def test_a_slot_takes_pieces_of_neighbours_one_row_a_batch(piece_rows):
    """What `piece` says comes next in a slot does come, in its later batches; most pieces are whole."""
    plan = TrainingPlan(_counts(30, 64, (0.7, 0.3)), seed=4, global_batch=6, piece_rows=piece_rows)
    steps = 300
    slots = {slot: [] for slot in itertools.product(range(6), plan.buckets)}
    told = {slot: [] for slot in slots}
    for step in range(steps):
        batch = plan.batch(step)
        for slot, place in enumerate(zip(batch.epoch.tolist(), _places(batch), strict=True)):
            queue = told[slot, batch.bucket]
            if queue:
                assert queue.pop(0) == place
            elif step:
                rest = plan.piece(step, np.array([slot]), steps)
                queue += zip(rest.epoch.tolist(), _places(rest), strict=True)
                slots[slot, batch.bucket].append(1 + len(queue))
    assert not any(told.values())  # nothing is told of that would come after the last step
    sizes = Counter(size for lengths in slots.values() for size in lengths)
    assert max(sizes) == piece_rows and sizes[piece_rows] > 0.7 * sizes.total()


def test_a_batch_has_rows_from_all_over_the_data_set():
    """1,000,000 rows in 1,000 shards, batch 4,096: a batch has rows of nearly all shards, where each of its slots opens one
    piece of 8 neighbours at a time.
    """
    plan = TrainingPlan(UnitCounts(np.full((1000, 1), 1000), ("b",)), seed=0, global_batch=4096)
    batches = [plan.batch(step) for step in (0, 1, 2, 100)]
    assert min(len(np.unique(batch.shard)) for batch in batches) > 950  # 4,096 by chance from 1,000: 983
    first, second = (batch.shard * 1000 + batch.row for batch in batches[:2])
    assert 0.85 < np.mean(second == first + 1) < 0.9  # 7 of 8 neighbours of a piece come in two batches of a bucket
    row = np.sort(first)
    assert np.mean(np.diff(row) == 1) < 0.01  # and in one batch they do not come together


def test_permutations_are_whole_and_even():
    for size in (1, 2, 3, 4, 5, 16, 17, 1000):
        keys = np.full(size, 7, dtype=np.uint64)
        assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))
    keys = np.random.default_rng(0).integers(0, 2**63, 60_000).astype(np.uint64)
    for size in (3, 6, 14, 100):  # where each place goes, over many keys: chi-square, 3.5 deviations
        for place in (0, 1, size - 1):
            found = np.bincount(permute(np.full(len(keys), place), size, keys), minlength=size)
            expected = len(keys) / size
            assert ((found - expected) ** 2 / expected).sum() < size - 1 + 3.5 * np.sqrt(2 * (size - 1))


def test_epochs_and_seeds_differ_and_the_same_plan_is_the_same():
    counts = _counts(shares=(1.0,))
    first, again, other = (TrainingPlan(counts, seed, 120) for seed in (1, 1, -1))
    rows = [plan.batch(step).shard * 100 + plan.batch(step).row for plan in (first, again, other) for step in (0, 1)]
    np.testing.assert_array_equal(rows[0], rows[2])
    assert (rows[0] != rows[1]).any() and (rows[0] != rows[4]).any()
    assert all(sorted(row) == sorted(rows[0]) for row in rows)


def test_golden_plan():
    """Checkpoints resume by step, so the plan of a seed must not change: raise train in specs.FORMATS where it does."""
    small, pieces = TrainingPlan(_counts(), seed=7, global_batch=5), TrainingPlan(_counts(), 7, 5, piece_rows=4)
    found = [(b.bucket, b.shard.tolist(), b.row.tolist()) for plan in (small, pieces) for b in map(plan.batch, (0, 50))]
    assert found == GOLDEN


GOLDEN = [
    ("b0", [3, 0, 3, 2, 5], [8, 6, 0, 0, 6]),
    ("b0", [0, 5, 5, 4, 3], [3, 7, 0, 0, 9]),
    ("b0", [4, 1, 5, 0, 4], [11, 5, 9, 3, 3]),
    ("b0", [0, 3, 4, 3, 4], [8, 10, 10, 1, 4]),
]


def test_fewer_rows_than_a_batch():
    plan = TrainingPlan(UnitCounts(np.array([[3]]), ("b",)), seed=0, global_batch=8)
    assert plan.batch(0).epoch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert plan.batch(1).epoch.tolist() == [2, 3, 3, 3, 4, 4, 4, 5]
    assert plan.epoch_report() == {"b": BucketReport(rows=3, batches=1, repeated=5)}


def test_report_and_empty_buckets():
    counts = UnitCounts(np.array([[16, 0, 4]]), ("full", "empty", "small"))
    assert TrainingPlan(counts, 0, 8).epoch_report() == {"full": BucketReport(16, 2, 0), "small": BucketReport(4, 1, 4)}
    assert {TrainingPlan(counts, 0, 8).batch(step).bucket for step in range(20)} == {"full", "small"}


def test_buckets_of_less_than_a_batch_are_left_out_where_they_are_few():
    """No step is made of one image again and again, unless most images stand in such buckets."""
    counts = UnitCounts(np.array([[500, 3, 0, 60], [480, 4, 0, 70]]), ("many", "few", "none", "some"))
    assert small_buckets(counts, 128) == {"few": 7} and small_buckets(counts, 131) == {"few": 7, "some": 130}
    kept = leave_out_small_buckets(counts, 128)
    assert kept.rows.tolist() == [[500, 0, 0, 60], [480, 0, 0, 70]] and kept.buckets == counts.buckets
    plan = TrainingPlan(kept, 0, 128)
    assert {plan.batch(step).bucket for step in range(100)} == {"many", "some"}
    assert leave_out_small_buckets(counts, 131) is counts  # 137 of 1,117 are too many
    assert leave_out_small_buckets(counts, 5000) is counts


def test_what_is_said_of_small_buckets():
    counts = UnitCounts(np.array([[995, 3, 2]]), ("64x64", "32x128", "128x32"))
    assert small_buckets_warning(counts, 2) is None
    assert small_buckets_warning(counts, 4) == (
        "5 images in buckets with fewer images than a batch of 4 (32x128, 128x32 px) left out of training:"
        " a step of theirs would show the same few again and again"
    )
    assert small_buckets_warning(counts, 1000).startswith(
        "1,000 images in buckets with fewer images than a batch of 1000"
    )
    assert "100% of all: their steps show images several times" in small_buckets_warning(counts, 1000)


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="no row to train on"):
        TrainingPlan(UnitCounts(np.zeros((2, 1), dtype=np.int64), ("b",)), 0, 8)


def test_a_thousand_million_rows_cost_what_a_thousand_do():
    """100,000 shards of 10,000 rows in 41 buckets: a plan takes 0.3 s to make here, a batch of 4,096 5 ms, whatever step it
    is, the first of an epoch too.
    """
    rows = np.full((100_000, 41), 244)
    started = time.perf_counter()
    plan = TrainingPlan(UnitCounts(rows, tuple(map(str, range(41)))), 0, 4096)
    assert time.perf_counter() - started < 5
    epoch = len(UnitCounts(rows, ())) // 4096
    for step in (0, epoch - 1, epoch, epoch + 1, 10**8):
        started = time.perf_counter()
        plan.batch(step)
        assert time.perf_counter() - started < 0.2
