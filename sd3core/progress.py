"""How far a piece of work has come: what workers report and terminals draw."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sd3core.words import format_seconds

RATE_WINDOW_S = 60.0
RATE_POINTS = 5  # at least: where a unit takes minutes, a window of seconds would see none


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s; `note` is what else a person wants to see now (a loss, a shard's name)."""

    done: int
    total: int
    unit: str
    note: str = ""
    rate: float | None = None  # units a second, of late; in all, since this attempt began, once all is done
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
    """Does nothing, for callers that show nothing."""


@dataclass
class ProgressMeter:
    """Adds rate and time left to counts.

    The clock starts with the first unit that is done: neither what an earlier attempt did nor the time that workers take to
    start counts for the rate. It is that of the last minute, so that a machine that got slower, or stands, is seen at once.
    """

    total: int
    unit: str
    report: ProgressCallback = ignore_progress
    already_done: int = 0
    done: int = field(init=False)
    # (how many were done, when): the clock's start, and the growth of late
    _first: tuple[int, float] | None = field(init=False, default=None)
    _points: deque[tuple[int, float]] = field(init=False, default_factory=deque)

    def __post_init__(self) -> None:
        self.done = self.already_done

    def advance(self, count: int = 1, note: str = "") -> None:
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", warning: str = "") -> None:
        self.done, now = done, time.monotonic()
        if self._points and done < self._points[-1][0]:  # a rank was lost, and what it had done since its checkpoint
            self._points.clear()
        if done > (self._points[-1][0] if self._points else self.already_done):
            self._points.append((done, now))
            self._first = self._first or self._points[0]
        while len(self._points) > RATE_POINTS and self._points[1][1] <= now - RATE_WINDOW_S:
            self._points.popleft()
        rate = self._rate_since(self._points[0] if self._points and done < self.total else self._first, now)
        seconds_left = (self.total - done) / rate if rate else None
        self.report(Progress(done, self.total, self.unit, note, rate, seconds_left, warning))

    def _rate_since(self, point: tuple[int, float] | None, now: float) -> float | None:
        count, when = point or (self.done, now)
        return (self.done - count) / (now - when) if self.done > count and now > when else None
