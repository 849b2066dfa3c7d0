"""Makes folders of this machine that live as long as a Ray session.

They are Ray's own, and one for the temporary files of its processes.

Processes that are killed tidy up nothing, and actors are always ended so: what they leave lies in the session's folder, and goes
with it or, where the session was killed too, at the next start. Ray lets every user of the machine write to its folder: above it
stands one that only its owner can enter.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from sd3core.errors import UserError

LONGEST_FOLDER = 40  # Ray adds up to 65 characters for its sockets, whose paths may have 107
OF_SESSIONS = ("session_*_*_*_*", "scratch_*")  # both end with the process id of the driver


def sessions_folder() -> Path:
    """Where Ray's sessions lie; what dead ones have left is removed."""
    remove_dead_sessions()
    candidates = _own_folders()
    return _guarded(next((c for c in candidates if len(str(c)) <= LONGEST_FOLDER), candidates[-1]))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for the temporary files of this session's processes: inside, a process that is started has it as its TMPDIR."""
    before = os.environ.get("TMPDIR")
    folder = _guarded(_own_folders()[0]) / f"scratch_{os.getpid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before


def remove_dead_sessions() -> None:
    """What is left of this user's sessions whose driver has ended."""
    of_before = [
        parent.with_name(f"sd3-ray-{os.getuid()}") for parent in _parents()
    ]  # of versions without a parent of their own
    roots = [parent / "ray" for parent in _parents() if _is_own(parent)] + [root for root in of_before if _is_own(root)]
    for root in roots:
        for folder in [found for pattern in OF_SESSIONS for found in root.glob(pattern)]:
            driver = folder.name.rpartition("_")[2]
            if folder.is_dir() and not folder.is_symlink() and driver.isdigit() and not psutil.pid_exists(int(driver)):
                shutil.rmtree(folder, ignore_errors=True)


def _own_folders() -> list[Path]:
    """This user's session folders, among the temporary files and where names are short."""
    return [parent / "ray" for parent in _parents()]


def _parents() -> list[Path]:
    return [Path(root) / f"sd3-{os.getuid()}" for root in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]


def _guarded(folder: Path) -> Path:
    """Made, below a parent that nobody else can enter. UserError where somebody else has made that: its files may be theirs."""
    parent = folder.parent
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_own(parent):
        raise UserError(f"{parent}: not a folder of this user's; remove it, or set TMPDIR to a folder of your own")
    parent.chmod(0o700)
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _is_own(folder: Path) -> bool:
    """A folder of this user's, and no link to one."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
