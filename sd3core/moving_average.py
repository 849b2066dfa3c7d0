"""The EMA of the weights in a phase: its decay, and what a short phase exports.

Until its first update the EMA is the live weights. Update n + 1 keeps min(ema_decay, n / (n + 9)) of it: the first one nothing,
the next 1 / 10, 2 / 11, ...; 0.99 stands from update 892 on. So no weight that the phase started from is in it, be it
random or another phase's, and it is a function of the step: not of the phase's length, which may grow.
"""

from __future__ import annotations

import math

from sd3core.recipe import Recipe, Training
from sd3core.words import counted

WARM_UP = 9  # the EMA reaches back over about a tenth of the updates made
TOLD_SHARE = 0.05  # of an export in one step's weights, above which it is said


def changes_average(training: Training, step: int) -> bool:
    """Whether the EMA is another one after `step`: at every update, and while it still follows the live weights."""
    return step < training.ema_every_steps or step % training.ema_every_steps == 0


def decay_at(training: Training, step: int) -> float:
    """What the EMA keeps of itself after `step` steps of its phase (1, 2, ...) where it changes."""
    return _decay(training.ema_decay, (step - 1) // training.ema_every_steps)


def first_share(training: Training, updates: int) -> float:
    """The share of the EMA after `updates` updates that is the weights of the first one: the product of the later decays."""
    return math.prod(_decay(training.ema_decay, made) for made in range(1, updates))


def short_average_warnings(recipe: Recipe) -> list[str]:
    """The warnings of `short_average_warning`, for all phases."""
    return [warning for key, phase in recipe.phases() if (warning := short_average_warning(key, phase))]


def short_average_warning(phase: str, training: Training) -> str | None:
    """What to know of a phase that is so short that its EMA is hardly an average; None of a longer one."""
    steps, every = training.total_steps, training.ema_every_steps
    updates, key = steps // every, f"{phase}.ema_every_steps"
    if updates == 0:
        return (
            f"{phase}: its {counted(steps, 'step')} end before the first update of the EMA ({key} {every:,}): an export holds"
            f" the live weights of the last step; for an average lower {key}"
        )
    if updates > 2 or (share := first_share(training, updates)) <= TOLD_SHARE:
        return None
    return (
        f"{phase}: its {counted(steps, 'step')} have {counted(updates, 'update')} of the EMA ({key} {every:,}):"
        f" {share:.0%} of an export are the weights after step {every:,}; for an average lower {key}"
    )


def _decay(limit: float, made: int) -> float:
    return min(limit, made / (made + WARM_UP))
