"""How far a piece of work has come: the one value that workers report and that terminals and UIs draw."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s; `note` is what else a person wants to see now (a loss, a shard's name)."""

    done: int
    total: int
    unit: str
    note: str = ""
    rate: float | None = None  # units a second, measured since this attempt began
    seconds_left: float | None = None

    def line(self) -> str:
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if self.rate:
            parts.append(f"{self.rate:,.1f} {self.unit}/s")
        if self.seconds_left is not None and self.done < self.total:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


ProgressCallback = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """For callers that show nothing."""


@dataclass
class ProgressMeter:
    """Adds rate and time left to counts; work that an earlier attempt did (`already_done`) does not count for the rate."""

    total: int
    unit: str
    report: ProgressCallback = ignore_progress
    already_done: int = 0
    done: int = field(init=False)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.already_done
        self._started = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "") -> None:
        self.done = done
        elapsed = time.monotonic() - self._started
        rate = (done - self.already_done) / elapsed if elapsed > 0 else None
        left = (self.total - done) / rate if rate else None
        self.report(Progress(done, self.total, self.unit, note, rate, left))


def format_seconds(seconds: float) -> str:
    minutes, secs = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"
