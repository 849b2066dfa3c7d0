"""Paths of this machine as users write them, and as file:// URLs.

A file:// URL has every byte but the plain ones as %XX (`Path.as_uri` writes it so), and is unquoted when it is opened; a path is taken as
it stands, `%20` and all.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from sd3core.errors import UserError

FILE_URL = "file://"
PROJECT = Path(__file__).resolve().parent.parent.parent  # the checkout, or where the packages are installed


def sd3_home() -> Path:
    """The folder of what is this machine's own: `SD3_HOME`, else `local/` of the checkout, else, without one, ~/.cache/sd3.

    The store, Prefect's database, logs and caches lie there, for every command and for workers on other machines.
    """
    if named := os.environ.get("SD3_HOME"):
        return Path(named).resolve()
    return PROJECT / "local" if (PROJECT / "pyproject.toml").is_file() else Path.home() / ".cache" / "sd3"


def expanded(path: Path | str) -> Path:
    """The path with `~` and `~user` written out. UserError for what can be none."""
    if not str(path):
        raise UserError("a path that is empty: name a file or a folder")
    if "\0" in str(path):
        raise UserError(f"{path}: no path has a NUL in it; name another")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: this machine knows no home of that user; write the whole path") from None


def path_of_url(url: str) -> Path:
    """The path of a URL: /a b of file:///a%20b."""
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(url.removeprefix(FILE_URL)))))


def shown_place(url: str) -> str:
    """What a person can open: the path of a file:// URL; any other URL as it is."""
    return str(path_of_url(url)) if url.startswith(f"{FILE_URL}/") else url
