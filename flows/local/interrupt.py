"""Ctrl-C: a command ends with one line that says what it leaves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTHING_LEFT = "stopped; what was finished stays, and nothing that it started is left running"


class Interrupted(BaseException):
    """Ctrl-C, and what it leaves. Not a KeyboardInterrupt: typer ends on that without a word."""


def listen(leaves: str = NOTHING_LEFT) -> None:
    """Has Ctrl-C raise Interrupted from here on, whose message says what it leaves."""

    def stop(*_: Any) -> None:
        raise Interrupted(leaves)

    signal.signal(signal.SIGINT, stop)


def end_on_the_next() -> None:
    """A further Ctrl-C ends the process at once and prints nothing."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def put_off() -> Iterator[None]:
    """Ctrl-C inside is heard at the end: for what must be written down once it was begun."""
    pressed: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextmanager
def unheard() -> Iterator[None]:
    """Ctrl-C inside is not heard: for the seconds in which what was started is ended."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """A program begun inside never hears Ctrl-C, whatever session it is given.

    Until a new process has its own session, a few instructions after it exists, the terminal's Ctrl-C ends it before it began.
    The thread's mask is what it inherits; here the press is heard at the end, at the latest.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
