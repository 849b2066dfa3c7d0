"""Where this machine keeps what its processes have fetched from the store."""

from __future__ import annotations

from pathlib import Path

from sd3core.data.checked_files import CheckedFiles
from sd3core.files.local_paths import sd3_home
from sd3core.towers.artifact import checked_files


def towers_cache() -> Path:
    """Fetched towers, for all workers."""
    return sd3_home() / "cache"


def shards_cache() -> Path:
    """Fetched shards, for all that read latents and text: bounded by its readers."""
    return towers_cache() / "shards"


def checked_here() -> CheckedFiles:
    """What this machine has compared with its digest."""
    return checked_files(towers_cache())
