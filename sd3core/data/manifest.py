"""MANIFEST.json: the word that a stage is done, and what it holds.

It says what it was made from, too.

Where it stands and matches, the stage is skipped. Beside the newest manifest every one that was ever committed stays
under its digest, so that a reader that was told a digest reads just that one, whatever has been added since.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sd3core.data.provenance import Provenance, provenance_path, put_provenance
from sd3core.data.shards import DoneRecord
from sd3core.data.store import Store, StoreNotFound, canonical_json
from sd3core.errors import DataError, StoreError
from sd3core.specs import INDEX, MANIFEST, manifest_copy

UNSET = "unset"
# keys are sorted: both stand before the shards
FIELDS_KEY, INPUTS_KEY, HEAD_BYTES = (
    '"fields": ',
    '"inputs": ',
    1 << 16,
)


class ShardEntry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    number: int
    stem: str
    rows: int
    failed: dict[str, int] = {}  # reason -> rows
    bytes: int
    digest: str  # sha256 of the main file
    index_digest: str | None = None
    buckets: dict[str, int] = {}

    @staticmethod
    def of(record: DoneRecord) -> ShardEntry:
        """What a manifest says of a finished shard."""
        return ShardEntry(
            number=record.number,
            stem=record.stem,
            rows=record.rows,
            failed=dict(sorted(Counter(row.reason for row in record.failed).items())),
            bytes=record.bytes,
            digest=record.digest,
            index_digest=record.files.get(INDEX),
            buckets=record.extra,
        )


class Manifest(BaseModel):
    """`fields` is what was fingerprinted into `spec`; `inputs` names the manifests it was made from by digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    spec: str
    fields: dict[str, Any]
    inputs: dict[str, str]
    folder: str
    shards: list[ShardEntry]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @property
    def buckets(self) -> dict[str, int]:
        return _sum(shard.buckets for shard in self.shards)

    @property
    def failed_reasons(self) -> dict[str, int]:
        return _sum(shard.failed for shard in self.shards)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        return canonical_json(json.loads(self.model_dump_json()))


@dataclass(frozen=True)
class ManifestRef:
    """A stage's output pinned by content: its folder in the store, and which of its manifests."""

    folder: str
    digest: str  # of the manifest, 64 hex digits

    @property
    def path(self) -> str:
        """The path of the copy that stays, whatever is committed later."""
        return manifest_copy(self.folder, self.digest)


def commit_manifest(store: Store, folder: str, manifest: Manifest, made_by: Provenance | None = None) -> ManifestRef:
    """Writes the immutable copy, then MANIFEST.json. One writer a stage commits (design, section 5).

    `made_by` goes beside them, first of all; None leaves what stands there.
    """
    data, digest = manifest.to_bytes(), manifest.digest
    ref = ManifestRef(folder, digest)
    if made_by is not None:
        put_provenance(store, provenance_path(folder, digest), made_by)
    store.put(ref.path, data)
    store.put(f"{folder}/{MANIFEST}", data)
    return ref


def read_manifest(store: Store, folder_or_path: str, digest: str | None = None) -> Manifest:
    """The newest manifest of a folder, or the one with `digest`. DataError if it is missing, damaged or another one.

    A copy by digest that is gone or altered is written again where MANIFEST.json is that one.
    """
    if folder_or_path.endswith(".json"):
        path = folder_or_path
    else:
        path = ManifestRef(folder_or_path, digest).path if digest else f"{folder_or_path}/{MANIFEST}"
    data = _get(store, path)
    if digest is not None and not _is(data, digest):
        newest = _get(store, f"{path.rpartition('/')[0]}/{MANIFEST}")
        if _is(newest, digest):
            data = newest
            with suppress(StoreError):  # a reader may not be allowed to write
                store.put(path, data)
    if data is None:
        raise DataError(
            f"{store.uri(path)}: no such manifest; the stage that makes it is not finished, or to be run again"
        )
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError:
        raise DataError(
            f"{store.uri(path)}: not a manifest of this version; delete it and run the stage again"
        ) from None
    if digest is not None and not _is(data, digest):
        raise DataError(f"{store.uri(path)}: not the manifest that was asked for ({digest[:12]}); run the stage again")
    if path.endswith(f"/{MANIFEST}"):  # its copy, written before it, has its digest in the name
        copy = ManifestRef(path.rpartition("/")[0], hashlib.sha256(data).hexdigest()).path
        if not store.exists(copy):
            raise DataError(
                f"{store.uri(path)}: not a manifest that was committed, {copy} is not there; run the stage again"
            )
    return manifest


@dataclass(frozen=True)
class ManifestHead:
    """What stands before a manifest's shards."""

    fields: dict[str, Any]
    inputs: dict[str, str]  # none of a manifest of towers


def read_head(store: Store, path: str) -> ManifestHead | None:
    """A manifest's first bytes, unchecked: one of 100,000 shards has tens of MB.

    None where no manifest stands at `path`, or one that cannot be read.
    """
    decoder = json.JSONDecoder()
    try:
        start = store.get_range(path, 0, min(HEAD_BYTES, store.size(path))).decode(errors="replace")
        fields, end = decoder.raw_decode(start, start.index(FIELDS_KEY) + len(FIELDS_KEY))
        place = start.find(INPUTS_KEY, end)
        inputs = decoder.raw_decode(start, place + len(INPUTS_KEY))[0] if place >= 0 else {}
    except (StoreError, ValueError):
        return None
    return ManifestHead(fields, inputs) if isinstance(fields, dict) and isinstance(inputs, dict) else None


def is_whole(store: Store, manifest: Manifest) -> bool:
    """Whether a manifest's copy under its digest stands beside it: what was altered by hand has none."""
    return _is(_get(store, ManifestRef(manifest.folder, manifest.digest).path), manifest.digest)


def _get(store: Store, path: str) -> bytes | None:
    try:
        return store.get(path)
    except StoreNotFound:
        return None


def _is(data: bytes | None, digest: str) -> bool:
    return data is not None and hashlib.sha256(data).hexdigest() == digest


def explain_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields in which two specs differ, as `text.t5_tokens: 16 -> 20`."""
    before, after = flatten(old), flatten(new)
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key, UNSET) != after.get(key, UNSET))
    return [f"{key}: {before.get(key, UNSET)} -> {after.get(key, UNSET)}" for key in keys]


def flatten(fields: Any, prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names; lists are values."""
    if not isinstance(fields, dict):
        return {prefix.removesuffix("."): fields}
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def _sum(counts) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items()))
