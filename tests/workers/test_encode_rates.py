"""Rates of the encoding bench are of the time in which all actors work."""

from __future__ import annotations

import pytest

from workers.encode_bench import ShardTime, rate_while_all_work


def test_one_actor_by_one_shard_at_a_time():
    assert rate_while_all_work([ShardTime(1, n / 2, (n + 1) / 2) for n in range(8)]) == pytest.approx(2)


def test_shards_at_once_count_by_their_parts():
    """Three at a time, each of 3 s, one ended a second."""
    times = [ShardTime(1, 0, n + 1) for n in range(3)] + [ShardTime(1, n - 2, n + 1) for n in range(3, 30)]
    assert rate_while_all_work(times) == pytest.approx(1, rel=0.05)


def test_what_one_actor_does_before_the_other_is_there_and_after_it_has_ended_does_not_count():
    slow_to_load = [ShardTime(2, 10 + n, 11 + n) for n in range(10)]
    assert rate_while_all_work([ShardTime(1, n, n + 1) for n in range(30)] + slow_to_load) == pytest.approx(2)
