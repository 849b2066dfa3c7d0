"""Records: JSON that says which bytes a file has, or holds its own digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sd3core.data.store import canonical_json


class FileRecord(BaseModel):
    """Which bytes a file has: their digest, and how many they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    bytes: int


def record_file(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


def record_bytes(data: bytes) -> FileRecord:
    return FileRecord(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def sha256_of(path: Path) -> str:
    """Digest of a file on this machine, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of all of a record but the digest in it."""
    return hashlib.sha256(canonical_json({key: record[key] for key in record if key != "sha256"})).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own digest in it."""
    return record | {"sha256": own_digest(record)}
