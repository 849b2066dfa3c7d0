"""Reads options that several commands have."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import typer

from sd3core.errors import UserError
from sd3core.files.local_paths import expanded


def path(text: str) -> Path:
    """Reads an option's path, with `~` written out. UserError for an empty one (of a variable that is not set)."""
    try:
        return expanded(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from None


def place(text: str) -> str:
    """Reads an option that is a path or an s3:// URL."""
    return text if text.startswith("s3://") else str(path(text))


def one_of(option: str, value: str | None, known: Collection[str]) -> None:
    """UserError unless the value is a known one, or none was given."""
    if value is not None and value not in known:
        raise UserError(f"{option} {value}: take one of {', '.join(known)}")


def file_to_write(option: str, path: Path | None) -> None:
    """UserError where it cannot be made at the end of the work: asked before it begins."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"{option} {path}: name a file in a folder that exists")


def device(asked: str | None) -> str:
    """A GPU where there is one and none is asked for. UserError for a device that PyTorch does not have here."""
    import torch  # slow to import, and most commands need none

    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError):  # the latter from a PyTorch that was built without CUDA
        raise UserError(f"--device {asked}: PyTorch has no such device here; take cpu, or leave it out") from None
    return asked
