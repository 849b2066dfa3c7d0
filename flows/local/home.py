"""Says where this machine keeps what is its own: `SD3_HOME`, or `local/`.

That is the store, Prefect's database, logs, caches, and the records of live runs.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sd3core.data.store import Store, open_store
from sd3core.errors import UserError
from sd3core.files.local_paths import PROJECT, sd3_home
from sd3core.files.whole_output import atomic_replacement
from sd3core.recipe import Recipe
from sd3core.shown_text import is_utf8, shell_word

LEAST_FREE_MB = 10
WORK_POOL, TAG = "local", "sd3"  # here, where nothing imports Prefect: its settings are chosen before it is


def home() -> Path:
    """This machine's own folder, for commands, flows and workers alike."""
    return sd3_home()


def check_home() -> None:
    """UserError where its name is no UTF-8: runs begin in it, and Prefect's server takes no such name."""
    if not is_utf8(str(home())):
        raise UserError(f"SD3_HOME {home()}: its name is not UTF-8, which Prefect's server wants; name another folder")


def ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def private_folder(folder: Path) -> Path:
    """A folder that no other user can look into."""
    ensure(folder).chmod(0o700)
    return folder


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """A reader sees the old file or the new one, never a part."""
    try:
        with atomic_replacement(path, mode=mode) as file:
            file.write(text.encode())
    except OSError as error:  # a failed write does not say where
        raise OSError(error.errno, error.strerror, str(path)) from None


def local_command(command: str) -> str:
    """A command of this installation as a message shows it: it can be pasted where the message came, whatever the project's folder
    is called.
    """
    program, *arguments = command.split(" ", 1)
    return " ".join([shell_word(f"{'' if _in_project() else f'{PROJECT}/'}.venv/bin/{program}"), *arguments])


def _in_project() -> bool:
    try:
        return Path.cwd() == PROJECT
    except FileNotFoundError:  # the folder is gone
        return False


def full_disk() -> str | None:
    """What to tell where this machine's own has no room: Prefect's database lies there too, and says it less clearly."""
    free = shutil.disk_usage(ensure(home())).free
    if free > LEAST_FREE_MB * 1e6:
        return None
    return f"only {free / 1e6:.1f} MB are free in {home()}; make room there, and the same command goes on"


def run_store(recipe: Recipe) -> Store:
    """The recipe's store; one it does not name is this machine's own."""
    return open_store(recipe.store or (home() / "store").as_uri())


@contextmanager
def one_at_a_time(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds `home()/NAME.lock`, and waits for whoever holds it, which it says. The system frees it when a process ends."""
    with (ensure(home()) / f"{name}.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another command, which holds {lock.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_holder(lock: TextIO) -> tuple[str, str]:
    """(process, run) as a run's lock has them."""
    lock.seek(0)
    process, _, run = lock.read().strip().partition(" ")
    return process, run
