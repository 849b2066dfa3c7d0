"""The plan's promises, each held by counting: once an epoch, one bucket a step, from a window, from any step."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from sd3core.data.training_plan import BucketReport, PlanTable, TrainingPlan
from sd3core.errors import DataError


def _table(shards: int = 6, rows: int = 20, shares=(0.6, 0.3, 0.1)) -> PlanTable:
    rng = np.random.default_rng(0)
    shard = np.repeat(np.arange(shards), rows)
    buckets = tuple(f"b{n}" for n in range(len(shares)))
    return PlanTable(shard, np.tile(np.arange(rows), shards), rng.choice(len(shares), len(shard), p=shares), buckets)


def _samples(plan: TrainingPlan, steps: int):
    """(bucket, epoch, (shard, row)) of every sample in order."""
    for batch in map(plan.batch, range(steps)):
        yield from zip(
            itertools.repeat(batch.bucket),
            batch.epoch.tolist(),
            zip(batch.shard.tolist(), batch.row.tolist(), strict=True),
        )


@pytest.mark.parametrize("global_batch", [1, 7, 8, 20, 64, 500])
def test_every_row_comes_exactly_once_in_every_epoch(global_batch):
    table = _table()
    plan = TrainingPlan(table, seed=3, global_batch=global_batch)
    seen = list(_samples(plan, 4000 // global_batch))
    assert len(set(seen)) == len(seen)  # (epoch, sample) never comes twice
    for code, bucket in enumerate(table.buckets):
        chosen = table.bucket == code
        wanted = set(zip(table.shard[chosen].tolist(), table.row[chosen].tolist(), strict=True))
        epochs = [epoch for name, epoch, _ in seen if name == bucket]
        assert epochs == sorted(epochs)
        for epoch in range(epochs[-1]):  # all but the last, which is under way
            assert Counter(sample for name, e, sample in seen if name == bucket and e == epoch) == Counter(wanted)


def test_batches_are_whole_of_one_bucket_and_interleaved_in_proportion():
    table = _table()
    plan = TrainingPlan(table, seed=1, global_batch=8)
    code_of = {
        (s, r): b for s, r, b in zip(table.shard.tolist(), table.row.tolist(), table.bucket.tolist(), strict=True)
    }
    counts = np.zeros(3)
    shares = np.bincount(table.bucket) / len(table)
    for step in range(600):
        batch = plan.batch(step)
        assert len(batch.shard) == len(batch.row) == len(batch.epoch) == 8
        code = table.buckets.index(batch.bucket)
        assert {code_of[place] for place in zip(batch.shard.tolist(), batch.row.tolist(), strict=True)} == {code}
        counts[code] += 1
        assert np.abs(counts - shares * (step + 1)).max() < 3  # at every moment, not only in the end


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.6, 0.3, 0.1), (0.001, 0.999), tuple([1 / 9] * 9)])
def test_any_step_is_reached_alone(shares):
    table = _table(8, 300, shares)
    plan = TrainingPlan(table, seed=5, global_batch=16)
    before = Counter()
    for step in range(1500):  # in order, each bucket's batches are numbered without a gap
        code, number = plan.bucket_of(step)
        assert number == before[code]
        before[code] += 1
    alone = TrainingPlan(table, seed=5, global_batch=16).batch(1499)
    inline = plan.batch(1499)
    for name in ("shard", "row", "epoch"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(inline, name))
    assert plan.bucket_of(10**9)[1] <= 10**9  # and far ones cost no more


def test_rows_come_from_a_moving_window_of_shards():
    table = PlanTable(np.repeat(np.arange(100), 50), np.tile(np.arange(50), 100), np.zeros(5000, int), ("b",))
    plan = TrainingPlan(table, seed=0, global_batch=50, window_shards=8)
    batches = [set(plan.batch(step).shard.tolist()) for step in range(100)]
    steps_of = {shard: [step for step, batch in enumerate(batches) if shard in batch] for shard in range(100)}
    # used for so long, then no more in this epoch
    assert max(steps[-1] - steps[0] for steps in steps_of.values()) <= 10
    assert max(map(len, batches)) <= 10 and np.mean([len(batch) for batch in batches[10:90]]) > 7  # and mixed well
    order = sorted(range(100), key=lambda shard: steps_of[shard][0])
    assert order != list(range(100))


def test_epochs_and_seeds_differ_and_the_same_plan_is_the_same():
    table = _table(shares=(1.0,))
    first, again, other = (TrainingPlan(table, seed, 120) for seed in (1, 1, -1))
    rows = [plan.batch(step).shard * 100 + plan.batch(step).row for plan in (first, again, other) for step in (0, 1)]
    np.testing.assert_array_equal(rows[0], rows[2])
    assert (rows[0] != rows[1]).any() and (rows[0] != rows[4]).any()
    assert all(sorted(row) == sorted(rows[0]) for row in rows)


def test_golden_plan():
    """Checkpoints resume by step, so the plan of a seed must not change."""
    plan = TrainingPlan(_table(), seed=7, global_batch=5)
    assert [(b.bucket, b.shard.tolist(), b.row.tolist()) for b in map(plan.batch, (0, 1, 50))] == [
        ("b0", [1, 0, 1, 0, 0], [1, 3, 12, 18, 8]),
        ("b1", [1, 1, 0, 1, 0], [2, 17, 7, 4, 10]),
        ("b2", [0, 3, 0, 1, 1], [5, 13, 9, 7, 6]),
    ]


def test_fewer_rows_than_a_batch():
    table = PlanTable(np.zeros(3, int), np.arange(3), np.zeros(3, int), ("b",))
    plan = TrainingPlan(table, seed=0, global_batch=8)
    assert plan.batch(0).epoch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2] and plan.batch(1).epoch.tolist() == [
        2,
        3,
        3,
        3,
        4,
        4,
        4,
        5,
    ]
    assert plan.epoch_report() == {"b": BucketReport(rows=3, batches=1, repeated=5)}


def test_report_and_empty_buckets():
    table = PlanTable(np.zeros(20, int), np.arange(20), np.array([0] * 16 + [2] * 4), ("full", "empty", "small"))
    assert TrainingPlan(table, 0, 8).epoch_report() == {"full": BucketReport(16, 2, 0), "small": BucketReport(4, 1, 4)}
    assert {TrainingPlan(table, 0, 8).batch(step).bucket for step in range(20)} == {"full", "small"}


def test_nothing_to_train_on_is_an_error():
    none = np.zeros(0, int)
    with pytest.raises(DataError, match="no row to train on"):
        TrainingPlan(PlanTable(none, none, none, ("b",)), 0, 8)


def test_a_million_rows_cost_little():
    import time

    table = PlanTable(
        np.repeat(np.arange(1000), 1000), np.tile(np.arange(1000), 1000), np.arange(10**6) % 7, tuple("abcdefg")
    )
    started = time.perf_counter()
    plan = TrainingPlan(table, 0, 256)
    [plan.batch(step) for step in range(200)]
    assert time.perf_counter() - started < 5
