"""The EMA's decay against closed forms: the share of each update's weights, a phase's start, the words about short phases."""

from __future__ import annotations

import math

import pytest

from sd3core.moving_average import changes_average, decay_at, first_share, short_average_warning
from sd3core.recipe import Training
from sd3core.recipe_file import load_recipe, shipped_recipes


def phase(steps: int, every: int = 1, decay: float = 0.99) -> Training:
    fields = {"samples": 8 * steps, "global_batch": 8, "micro_batch": 8, "checkpoint_every_samples": 8}
    return Training(**fields, ema_every_steps=every, ema_decay=decay)


def shares(training: Training) -> list[float]:
    """What the EMA at the phase's end holds of the start (first) and of the weights after each step."""
    held = [1.0]
    for step in range(1, training.total_steps + 1):
        held.append(0.0)
        if changes_average(training, step):
            decay = decay_at(training, step)
            held = [share * decay for share in held]
            held[step] += 1 - decay
    return held


@pytest.mark.parametrize("updates", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("every", [1, 7])
def test_the_first_updates_share_is_a_binomial(updates, every):
    """prod n / (n + 9) for n = 1 .. N - 1 is 9! (N - 1)! / (N + 8)!, and the start's share is nothing."""
    training = phase(every * updates, every)
    held = shares(training)
    assert held[0] == 0 and sum(held) == pytest.approx(1)
    assert [step for step, share in enumerate(held) if share] == [every * n for n in range(1, updates + 1)]
    assert held[every] == pytest.approx(1 / math.comb(updates + 8, 9)) == first_share(training, updates)


def test_the_papers_decay_stands_from_892_updates_on():
    training = phase(1_000)
    assert [decay_at(training, step) for step in (1, 2, 3)] == [0, 1 / 10, 2 / 11]
    assert decay_at(training, 891) < 0.99 == decay_at(training, 892) == decay_at(training, 1_000)
    assert shares(training)[-1] == pytest.approx(0.01)


def test_the_decay_does_not_depend_on_the_length():
    assert [decay_at(phase(10), step) for step in range(1, 11)] == [
        decay_at(phase(10_000), step) for step in range(1, 11)
    ]


@pytest.mark.parametrize("steps", [1, 6])
def test_without_an_update_an_export_holds_the_live_weights(steps):
    training = phase(steps, every=7)
    assert shares(training) == [0.0] * steps + [1.0]
    assert short_average_warning("pretrain", training) == (
        f"pretrain: its {steps} step{'s' if steps > 1 else ''} end before the first update of the EMA (pretrain.ema_every_steps 7):"
        " an export holds the live weights of the last step; for an average lower pretrain.ema_every_steps"
    )


def test_a_phase_of_few_updates_is_told():
    assert short_average_warning("finetune.0", phase(190, every=100)) == (
        "finetune.0: its 190 steps have 1 update of the EMA (finetune.0.ema_every_steps 100): 100% of an export are the"
        " weights after step 100; for an average lower finetune.0.ema_every_steps"
    )
    assert ": 10% of an export are the weights after step 100;" in short_average_warning(
        "pretrain", phase(299, every=100)
    )
    assert short_average_warning("pretrain", phase(299, every=100, decay=0.04)) is None  # 4 % by the recipe's own decay
    assert short_average_warning("pretrain", phase(300, every=100)) is None  # 2 %


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_shipped_recipe_is_too_short_for_its_average(name):
    assert not [key for key, training in load_recipe(name).phases() if short_average_warning(key, training)]
