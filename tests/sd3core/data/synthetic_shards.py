"""A data set of any size that no disk holds: indexes and tars are made as they are asked for, and what is asked counts.

All shards are alike, and rows are small; their manifests speak of the sizes of `Sizes`, so that whatever counts bytes ahead
counts those.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sd3core.conditioning import TextFeatures
from sd3core.data.encoded_shards import FILE_DIGEST, latent_bytes
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.shards import shard_stem
from sd3core.data.store import Store
from sd3core.data.stored_text import StoredText

TOKENS = {"clip_tokens": 2, "t5_tokens": 2}


@dataclass(frozen=True)
class Sizes:
    """Bytes of a row as sd3-2b and sd3-8b store it."""

    latent: int  # 16 channels of 16 bit: 33 kB at 256 px, 524 kB at 1024 px
    caption: int = 983_040  # the plain layout

    @property
    def row(self) -> int:
        return self.latent + self.caption


def bucket_names(count: int) -> list[str]:
    return [f"16x{16 + 8 * number}" for number in range(count)]


class SyntheticShards(Store):
    """A store elsewhere that holds `shards` shards of `rows` rows, two captions a row, in so many buckets.

    `names`: the buckets' own instead; `caption_width`: of T5's two tokens, in float32.
    """

    def __init__(
        self,
        shards: int,
        rows: int,
        buckets: int,
        sizes: Sizes,
        names: tuple[str, ...] | None = None,
        caption_width: int = 4,
    ) -> None:
        super().__init__("s3://synthetic")
        self.shards, self.rows, self.sizes = shards, rows, sizes
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()  # of tars as they are here, and of indexes
        shares = np.geomspace(1, 0.02, buckets)  # as aspect ratios are: few of most
        counts = np.diff(np.round(np.cumsum(np.append(0, shares)) / shares.sum() * rows)).astype(int)
        self.counts = dict(zip(names or bucket_names(buckets), counts.tolist(), strict=True))
        self._latents = {name: _member("latent", _latent(name)) for name in self.counts}
        self._caption = _member("caption", _caption(caption_width))

    def __reduce__(self):
        raise TypeError("a counting store stays in its process")

    @cached_property
    def latent_ends(self) -> np.ndarray:
        lengths = [len(self._latents[name][0]) for name, count in self.counts.items() for _ in range(count)]
        return np.cumsum(lengths)

    @cached_property
    def _indexes(self) -> dict[str, bytes]:
        names = [name for name, count in self.counts.items() for _ in range(count)]
        keys = [f"image-{row:08d}" for row in range(self.rows)]
        latents = {
            "key": keys,
            "offset": np.append(0, self.latent_ends[:-1]),
            "length": np.diff(self.latent_ends, prepend=0),
            "bucket": names,
            "sha256": pa.array([self._latents[name][1] for name in names], FILE_DIGEST[1]),
            "split": ["train"] * self.rows,
        }
        length = len(self._caption[0])
        text = {
            "key": np.repeat(keys, 2),
            "kind": ["original", "synthetic"] * self.rows,
            "offset": np.arange(2 * self.rows) * length,
            "length": np.full(2 * self.rows, length),
            "sha256": pa.array([self._caption[1]] * 2 * self.rows, FILE_DIGEST[1]),
        }
        return {"latents": _parquet(latents), "text": _parquet(text)}

    def manifests(self) -> tuple[Manifest, Manifest]:
        def manifest(stage: str, rows: int, size: int, counts: dict[str, int]) -> Manifest:
            digest = hashlib.sha256(self._indexes[stage]).hexdigest()
            shards = [
                ShardEntry(
                    number=number,
                    stem=shard_stem(number, f"{number:012x}"),
                    rows=rows,
                    bytes=size,
                    digest=hashlib.sha256(f"{stage}{number}".encode()).hexdigest(),
                    index_digest=digest,
                    buckets=counts,
                )
                for number in range(self.shards)
            ]
            fields = {"spec": "0" * 12, "fields": {}, "inputs": {"raw": "r"}, "folder": stage}
            return Manifest(stage=stage, shards=shards, **fields)

        counts = {name: count for name, count in self.counts.items() if count}
        return (
            manifest("latents", self.rows, self.rows * self.sizes.latent, counts),
            manifest("text", 2 * self.rows, 2 * self.rows * self.sizes.caption, {}),
        )

    def stored_bytes(self, bucket: str) -> int:
        """Of a row and the one caption that is chosen, as they lie in these tars."""
        return len(self._latents[bucket][0]) + len(self._caption[0])

    def get(self, path: str) -> bytes:
        return self._counted("index", self._indexes[path.partition("/")[0]])

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        stage = path.partition("/")[0]
        if stage == "text":
            whole = len(self._caption[0])
            assert offset % whole == length % whole == 0
            return self._counted(stage, self._caption[0] * (length // whole))
        first, last = np.searchsorted(self.latent_ends, [offset, offset + length - 1], side="right")
        names = self._names[first : last + 1]
        begin = int(self.latent_ends[first]) - len(self._latents[names[0]][0])
        data = b"".join(self._latents[name][0] for name in names)[offset - begin :][:length]
        return self._counted(stage, data)

    @cached_property
    def _names(self) -> list[str]:
        return [name for name, count in self.counts.items() for _ in range(count)]

    def _counted(self, kind: str, data: bytes) -> bytes:
        self.requests[kind] += 1
        self.bytes[kind] += len(data)
        return data

    def put(self, path, data):
        raise NotImplementedError

    get_file = put_file = list = folders = delete = version = entry = put


def _latent(bucket: str) -> bytes:
    height, width = (int(side) // 8 for side in bucket.split("x"))
    return latent_bytes(torch.zeros(16, height, width, dtype=torch.float16))


def _caption(width: int) -> bytes:
    tokens = [torch.zeros(1, 2, width) for width in (2, 2, width)]
    pooled = [torch.zeros(1, width) for width in (2, 2)]
    features = TextFeatures(*tokens, *pooled, torch.full((1, 3), 2))
    return StoredText.of(features, "float32").to_bytes("reference")


def _member(name: str, data: bytes) -> tuple[bytes, bytes]:
    """A file as it lies in a tar, and its digest."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    return sink.getvalue()[:end], hashlib.sha256(data).digest()


def _parquet(columns: dict) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue()
