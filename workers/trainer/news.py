"""What a phase tells while it trains: losses, warnings, pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

LOSSES_KEPT = 600  # as many as a plot can show
SILENT_RANKS_S = 15.0  # without a word from the ranks: then their progress says so


@dataclass(frozen=True)
class TrainingNews:
    """Everything told so far in this call."""

    losses: tuple[tuple[int, float], ...] = ()  # (samples seen, loss), thinned
    warnings: tuple[str, ...] = ()
    previews: tuple[str, ...] = ()  # paths in the store


NewsCallback = Callable[[TrainingNews], None]


def ignore_news(news: TrainingNews) -> None:
    """Does nothing, for callers that show nothing."""


@dataclass
class LossPoints:
    """(samples, loss) of every `every`-th step, which doubles whenever there are more than LOSSES_KEPT."""

    points: list[tuple[int, float]] = field(default_factory=list)
    every: int = 1
    _seen: int = 0
    _last: tuple[int, float] | None = None

    def add(self, samples: int, loss: float) -> None:
        self._last = (samples, loss)
        if self._seen % self.every == 0:
            self.points.append(self._last)
        if len(self.points) > LOSSES_KEPT:
            self.points, self.every = self.points[::2], 2 * self.every
        self._seen += 1

    def with_last(self) -> tuple[tuple[int, float], ...]:
        """The points, and the last step where it is not one of them."""
        behind = self._last is not None and self.points[-1:] != [self._last]
        return (*self.points, self._last) if behind else tuple(self.points)

    def go_back(self, samples: int) -> None:
        """Training goes on from an earlier checkpoint: what came after it did not stand."""
        self.points, self._last = [point for point in self.points if point[0] <= samples], None


def last_word(note: str, silent_s: float, stall_timeout_s: float) -> str:
    """What a person sees of the ranks: their last note, or for how long there has been no other."""
    if not note or silent_s < SILENT_RANKS_S:
        return note or "starting the ranks"
    limit = f"{stall_timeout_s:g} s (compute.stall_timeout_s)"
    return f"no word from the ranks for {silent_s:.0f} s; given up after {limit}; last: {note}"
