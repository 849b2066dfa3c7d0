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
    warning: str = ""  # what went wrong with the units that were just done

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
    """Adds rate and time left to counts.

    The clock starts with the first unit that is done: neither what an earlier attempt did nor the time that workers take to
    start counts for the rate.
    """

    total: int
    unit: str
    report: ProgressCallback = ignore_progress
    already_done: int = 0
    done: int = field(init=False)
    _first: tuple[int, float] | None = field(
        init=False, default=None
    )  # how many were done when the clock started, and when

    def __post_init__(self) -> None:
        self.done = self.already_done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", warning: str = "") -> None:
        self.done = done
        if self._first is None and done > self.already_done:
            self._first = (done, time.monotonic())
        rate = self._rate()
        seconds_left = (self.total - done) / rate if rate else None
        self.report(Progress(done, self.total, self.unit, note, rate, seconds_left, warning))

    def _rate(self) -> float | None:
        if self._first is None:
            return None
        count, started = self._first
        elapsed = time.monotonic() - started
        return (self.done - count) / elapsed if self.done > count and elapsed > 0 else None


def format_seconds(seconds: float) -> str:
    minutes, secs = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
