"""Records: JSON that says which bytes a file has, or holds its own digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from sd3core.data.store import canonical_json


def bytes_record(data: bytes) -> dict[str, Any]:
    """What a record says of a file with these bytes."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def own_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of all of a record but the digest in it."""
    return hashlib.sha256(canonical_json({key: record[key] for key in record if key != "sha256"})).hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its own digest in it."""
    return record | {"sha256": own_digest(record)}
