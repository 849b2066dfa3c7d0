"""Folders of this machine that live as long as a Ray session: Ray's own, and one for the temporary files of its processes.

Processes that are killed tidy up nothing, and actors are always ended so: what they leave lies in the session's folder, and goes
with it or, where the session was killed too, at the next start.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LONGEST_FOLDER = 40  # Ray adds up to 65 characters for its sockets, whose paths may have 107
OF_SESSIONS = ("session_*_*_*_*", "scratch_*")  # both end with the process id of the driver


def sessions_folder() -> Path:
    """Where Ray's sessions lie; what dead ones have left is removed."""
    remove_dead_sessions()
    candidates = _own_folders()
    folder = next((c for c in candidates if len(str(c)) <= LONGEST_FOLDER), candidates[-1])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """For the temporary files of this session's processes: inside, a process that is started has it as its TMPDIR."""
    before = os.environ.get("TMPDIR")
    folder = _own_folders()[0] / f"scratch_{os.getpid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def remove_dead_sessions() -> None:
    """What is left of this user's sessions whose driver has ended."""
    for root in _own_folders():
        for folder in [found for pattern in OF_SESSIONS for found in root.glob(pattern)]:
            driver = folder.name.rpartition("_")[2]
            if folder.is_dir() and not folder.is_symlink() and driver.isdigit() and not psutil.pid_exists(int(driver)):
                shutil.rmtree(folder, ignore_errors=True)


def _own_folders() -> list[Path]:
    """In the folder for temporary files, and in the one whose name is short."""
    return [Path(root) / f"sd3-ray-{os.getuid()}" for root in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]
