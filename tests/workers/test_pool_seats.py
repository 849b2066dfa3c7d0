"""Which actor of a pool takes which task, without Ray."""

from __future__ import annotations

from types import SimpleNamespace

from workers.pool import PoolSettings, _Answer, _Pool, _Seat


class ThreeTasks:
    tasks_at_once = 3


def pool_of(tasks: int, seats: int, loading: int, worker: type = ThreeTasks) -> _Pool:
    """With `loading` of its seats not ready yet."""
    pool = _Pool(worker, {}, [f"t{number}" for number in range(tasks)], PoolSettings(actors=seats), None, None, None)
    one = SimpleNamespace(remote=lambda task: object())
    call = SimpleNamespace(options=lambda **_: one, remote=one.remote)
    pool.seats = [_Seat(SimpleNamespace(call=call), "load" if n >= seats - loading else None) for n in range(seats)]
    return pool


def given(pool: _Pool) -> list[list[int]]:
    pool._give_out()
    return [[call.position for call in seat.calls.values()] for seat in pool.seats]


def test_every_actor_has_a_task_before_any_has_two():
    assert given(pool_of(8, 2, 0)) == [[0, 2, 4], [1, 3, 5]]
    assert given(pool_of(3, 2, 0)) == [[0, 2], [1]]
    assert given(pool_of(8, 2, 0, object)) == [[0], [1]]


def test_a_second_task_is_kept_for_an_actor_that_still_loads():
    assert given(pool_of(2, 2, 1)) == [[0], []]
    assert given(pool_of(3, 2, 1)) == [[0, 1], []]
    assert given(pool_of(9, 2, 1)) == [[0, 1, 2], []]


def test_a_task_that_was_lost_with_others_runs_alone():
    pool = pool_of(4, 1, 0)
    pool.alone = {0, 2}
    assert given(pool) == [[0]]
    for expected in ([1], [2], [3]):  # 2 waits until 1 has ended, and nothing runs beside it
        (reference,) = pool.seats[0].calls
        pool._take_result(pool.seats[0], reference, _Answer("made"))
        assert given(pool) == [expected]


def test_a_lost_actors_neighbours_keep_their_attempts_where_the_cause_is_known(monkeypatch):
    monkeypatch.setattr("workers.pool.ray.kill", lambda actor: None)
    for known, counted in ((True, [1, 0, 0]), (False, [1, 1, 1])):
        pool = pool_of(3, 1, 0)
        pool._seated = lambda failed_loads=0: _Seat(None, "load")
        given(pool)
        (seat,) = pool.seats
        pool._lost(seat, "out of memory", next(iter(seat.calls.values())) if known else None)
        assert pool.attempts == counted and sorted(pool.waiting) == [0, 1, 2]
        assert pool.alone == ({0} if known else {0, 1, 2})
