"""Where this machine keeps what is its own: the local store, Prefect's database, logs, caches, the records of live runs."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """`SD3_HOME`, or `local/` beside the packages."""
    return Path(os.environ.get("SD3_HOME") or PROJECT / "local").resolve()


def ensure(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
