"""The losses that are kept for a look at a phase: few, evenly spread, and none of what did not stand. What is said of silence."""

from __future__ import annotations

import pytest

from workers.trainer.news import LOSSES_KEPT, LossPoints, last_word


@pytest.mark.parametrize("steps", [1, LOSSES_KEPT, LOSSES_KEPT + 1, 5000, 100_000])
def test_every_step_of_a_power_of_two(steps):
    losses = LossPoints()
    for step in range(steps):
        losses.add(8 * step, float(step))
    assert losses.points == [(8 * step, float(step)) for step in range(0, steps, losses.every)]
    assert losses.with_last()[-1] == (8 * (steps - 1), steps - 1)
    assert losses.every == 1 if steps <= LOSSES_KEPT else LOSSES_KEPT / 2 <= len(losses.points) <= LOSSES_KEPT


def test_going_back_to_a_checkpoint():
    losses = LossPoints()
    for step in range(1, 11):
        losses.add(8 * step, 1.0)
    losses.go_back(32)
    assert losses.with_last() == tuple(losses.points)
    losses.add(40, 2.0)
    assert losses.points == [(8, 1.0), (16, 1.0), (24, 1.0), (32, 1.0), (40, 2.0)]


@pytest.mark.parametrize(
    ("note", "silent_s", "shown"),
    [
        ("", 40.0, "starting the ranks"),
        ("loss 0.5", 14.0, "loss 0.5"),
        (
            "loss 0.5",
            33.7,
            "no word from the ranks for 34 s; given up after 600 s (compute.stall_timeout_s); last: loss 0.5",
        ),
    ],
)
def test_silence_is_told(note, silent_s, shown):
    assert last_word(note, silent_s, 600.0) == shown
