"""Finds, tells apart and ends processes of this machine.

They are told apart by their birth, and ended with all below them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

STOP_SECONDS = 15
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
START_FIELD = 19  # of those after the name in /proc/PID/stat: field 22 of all
DEAD = ("Z", "X")  # a zombie, and what is gone


@dataclass(frozen=True)
class Process:
    """A process by number and birth, so that a number used again is not taken for it.

    The birth is in clock ticks since the machine started, beside the id of that start: setting the clock moves neither. Where
    there is no /proc it is what the system wrote down as the process began.
    """

    pid: int
    start: float
    boot: str

    @classmethod
    def of(cls, pid: int) -> Process:
        """Raises psutil.NoSuchProcess where there is none."""
        start, boot, _ = _birth(pid)
        return cls(pid, start, boot)

    @classmethod
    def from_record(cls, record: Any) -> Process:
        """ValueError for what is no record. One of an older version holds the time of day at which the process began."""
        match record:
            case {"pid": int(pid), "start": int() | float() as start, "boot": str(boot)}:
                return cls(pid, start, boot)
            case {"pid": int(pid), "born": int() | float() as born}:
                with suppress(psutil.NoSuchProcess):
                    if abs(psutil.Process(pid).create_time() - born) < 1.0:
                        return cls.of(pid)
                return cls(pid, -1, "")
        raise ValueError(f"{record!r} is no record of a process")

    def alive(self) -> bool:
        try:
            start, boot, state = _birth(self.pid)
        except psutil.NoSuchProcess:
            return False
        return (start, boot) == (self.start, self.boot) and state not in DEAD

    def environment(self) -> dict[str, str]:
        """What it was started with; nothing of one that is gone, or of another user's."""
        try:
            return psutil.Process(self.pid).environ() if self.alive() else {}
        except (psutil.Error, OSError):
            return {}


def find_process(arguments: Sequence[str], **environment: str) -> Process | None:
    """The process of this Python that was started with these arguments and has these values in its environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.cmdline()[1 : len(arguments) + 1] != list(arguments):
                continue
            found = process.environ()
            if all(found.get(name) == value for name, value in environment.items()):
                return Process.of(process.pid)
    return None


def stop_tree(process: Process) -> None:
    """SIGTERM to the process and its descendants, SIGKILL to what is left: nothing stays running."""
    if not process.alive():
        return
    try:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in tree:
        _signal(member, signal.SIGTERM)
    _, left = psutil.wait_procs(tree, timeout=STOP_SECONDS)
    for member in left:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(left, timeout=STOP_SECONDS)


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _birth(pid: int) -> tuple[float, str, str]:
    """When it began, of which start of the machine, and its state as one letter."""
    if sys.platform != "linux":
        process = psutil.Process(pid)
        return process.create_time(), "", "Z" if process.status() == psutil.STATUS_ZOMBIE else "R"
    try:
        # a name may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    return int(fields[START_FIELD]), _boot_id(), fields[0]


def _boot_id() -> str:
    """Nothing where the kernel has none: then a number and its ticks must do."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
