"""Rates of the encoding bench are of the time in which all actors work."""

from __future__ import annotations

import math

import pytest

from workers.encode_bench import ShardTime, rate_while_all_work


def test_one_actor_by_one_shard_at_a_time():
    assert rate_while_all_work([ShardTime(1, n / 2, (n + 1) / 2) for n in range(8)], 1) == pytest.approx(2)


def test_shards_at_once_count_by_their_parts():
    """Three at a time, each of 3 s, one ended a second."""
    times = [ShardTime(1, 0, n + 1) for n in range(3)] + [ShardTime(1, n - 2, n + 1) for n in range(3, 30)]
    assert rate_while_all_work(times, 1) == pytest.approx(1, rel=0.05)


def test_what_one_actor_does_before_the_other_is_there_and_after_it_has_ended_does_not_count():
    slow_to_load = [ShardTime(2, 10 + n, 11 + n) for n in range(10)]
    assert rate_while_all_work([ShardTime(1, n, n + 1) for n in range(30)] + slow_to_load, 2) == pytest.approx(2)


def test_actors_that_were_never_at_work_together_have_no_rate():
    alone = [ShardTime(1, n, n + 1) for n in range(4)]
    assert math.isnan(rate_while_all_work(alone, 2))
    assert math.isnan(rate_while_all_work([*alone, ShardTime(2, 9, 10)], 2))
