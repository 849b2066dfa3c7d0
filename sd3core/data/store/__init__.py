"""Stores by URL: file:///path, a plain path, or s3://bucket/prefix."""

from __future__ import annotations

from sd3core.data.store.contract import (
    Store,
    StoreDamaged,
    StoreDenied,
    StoreEntry,
    StoreNotFound,
    canonical_json,
    is_transient,
)
from sd3core.data.store.files import FileStore
from sd3core.data.store.s3 import S3Store
from sd3core.errors import StoreError
from sd3core.files.local_paths import path_of_url

__all__ = [
    "FileStore",
    "S3Store",
    "Store",
    "StoreDamaged",
    "StoreDenied",
    "StoreEntry",
    "StoreNotFound",
    "canonical_json",
    "is_transient",
    "open_store",
]


def open_store(url: str) -> Store:
    """Opens `file:///abs/path`, a plain path, or `s3://bucket/prefix`. Touches nothing yet."""
    scheme, colon, _ = url.partition(":")
    if not colon or "/" in scheme:
        if not url:
            raise StoreError("store '': name a path, file:///path or s3://bucket/prefix")
        return FileStore(url)
    if url.startswith("file:///"):
        return FileStore(path_of_url(url))
    if url.startswith("s3://"):
        return S3Store(url)
    raise StoreError(f"store {url!r}: a store is a path, file:///path or s3://bucket/prefix")
