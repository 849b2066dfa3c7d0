"""What a metric gives: a number with its count, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Of the validation loss, rectified flow's t: the last, 1, is measured but left out of the average. An evaluation is planned
# with them before any torch is loaded.
LEVELS = tuple(i / 8 for i in range(1, 9))


@dataclass(frozen=True)
class Score:
    value: float
    count: int  # images (or prompts) it was taken over
    beside: dict[str, Any] = field(default_factory=dict)  # JSON values without which it cannot be read


@dataclass(frozen=True)
class LeftOut:
    """A score whose sample is too small to mean anything; `reason` names the bound."""

    reason: str


def too_few(metric: str, count: int, bound: int, what: str) -> LeftOut:
    return LeftOut(f"{metric} needs at least {bound} {what}; there {'is' if count == 1 else 'are'} {count}")
