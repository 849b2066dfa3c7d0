"""From manifests to batches: whole shards into a bounded local cache, decoded once, joined with their captions' features.

A batch is gathered from decoded shards by row numbers; nothing is parsed in the training loop. Every shard is checked against
the digest in its manifest before it is used.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from sd3core.conditioning import TextFeatures
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.plan import PlanTable, TrainingPlan
from sd3core.data.shards import read_index, read_samples, sample_id
from sd3core.data.store import PARTIAL, Store
from sd3core.errors import DataError
from sd3core.randomness import uniform

Split = Literal["train", "held_out"]
LISTING_THREADS = 16
DECODED_SHARDS = 24  # kept in memory; a moving window of 8 shards is in use at a time, with the next ones


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a step: one bucket."""

    latent: Tensor  # (B, 16, h, w) float32, normalised
    text: TextFeatures
    sample_ids: np.ndarray  # (B,) int64
    epochs: np.ndarray  # (B,) int64
    keys: list[str]
    bucket: str  # HEIGHTxWIDTH in px


@dataclass(frozen=True, eq=False)
class ShardRows:
    """What one shard's indexes say, before its tensors are read."""

    latents: ShardEntry
    text: ShardEntry
    keys: list[str]
    buckets: list[str]
    splits: list[str]
    captions: dict[str, dict[str, str]]  # key -> kind -> caption id


@dataclass(frozen=True, eq=False)
class DecodedShard:
    """A shard's tensors: latents stacked by bucket, every distinct caption's features stacked once."""

    rows: ShardRows
    stacked: dict[str, Tensor]  # bucket -> (n, 16, h, w)
    place: np.ndarray  # (rows,) position within the row's bucket
    text: TextFeatures
    original: np.ndarray  # (rows,) position in `text`, -1 where there is none
    synthetic: np.ndarray


class ShardCache:
    """Local copies of stored shards, checked once, at most `max_bytes` of them. Several ranks of a machine may share one folder."""

    def __init__(self, store: Store, folder: Path, max_bytes: float) -> None:
        self.store, self.folder, self.max_bytes = store, folder, max_bytes

    def read(self, path: str, digest: str) -> bytes:
        """The bytes of a stored tar. DataError if they are not those that the manifest names."""
        local = self.store.local_path(path)
        if local is not None:  # a file store needs no copy
            return self._checked(self.store.get(path), path, digest)
        cached = self.folder / digest
        if cached.is_file():
            cached.touch()
            return cached.read_bytes()
        data = self._checked(self.store.get(path), path, digest)
        self._keep(cached, data)
        return data

    def _checked(self, data: bytes, path: str, digest: str) -> bytes:
        if hashlib.sha256(data).hexdigest() != digest:
            done = path.removesuffix(".tar") + ".done.json"
            raise DataError(f"{self.store.uri(path)}: its bytes are not those of its manifest; delete {done} and run the stage again")
        return data

    def _keep(self, cached: Path, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{PARTIAL}{cached.name}-{threading.get_ident()}-{id(data)}"
        partial.write_bytes(data)
        partial.replace(cached)
        files = sorted((f for f in self.folder.iterdir() if PARTIAL not in f.name), key=lambda f: f.stat().st_mtime)
        total = sum(f.stat().st_size for f in files)
        for oldest in files[:-1]:
            if total <= self.max_bytes:
                break
            total -= oldest.stat().st_size
            oldest.unlink(missing_ok=True)


class ShardReader:
    """Joins the latents and the text of one data set, shard by shard. Shards line up by their numbers."""

    def __init__(
        self, store: Store, latents: Manifest, text: Manifest, cache: ShardCache, *, clip_tokens: int, t5_tokens: int
    ) -> None:
        _check_line_up(latents, text)
        self.store, self.latents, self.text, self.cache = store, latents, text, cache
        self.clip_tokens, self.t5_tokens = clip_tokens, t5_tokens
        by_number = {shard.number: shard for shard in text.shards}
        with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="index") as threads:
            self.shards = list(threads.map(lambda shard: self._read_rows(shard, by_number[shard.number]), latents.shards))
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, split: Split = "train") -> tuple[PlanTable, int]:
        """Rows of the split that have a caption, and how many were left out for having none."""
        places, names, without = [], sorted({bucket for shard in self.shards for bucket in shard.buckets}), 0
        codes = {name: code for code, name in enumerate(names)}
        for position, shard in enumerate(self.shards):
            for row, (key, bucket) in enumerate(zip(shard.keys, shard.buckets, strict=True)):
                if shard.splits[row] != split:
                    continue
                if not shard.captions.get(key):
                    without += 1
                    continue
                places.append((position, row, codes[bucket]))
        columns = np.array(places, dtype=np.int64).reshape(-1, 3).T
        return PlanTable(columns[0], columns[1], columns[2], tuple(names)), without

    def gather(self, shards: np.ndarray, rows: np.ndarray, synthetic: np.ndarray, epochs: np.ndarray, bucket: str) -> Batch:
        """A batch of rows. `synthetic` (B,) bool: which caption is wanted; where there is only one, that one is taken."""
        latents, texts, keys = [], [], []
        for position, row, wants_synthetic in zip(shards.tolist(), rows.tolist(), synthetic.tolist(), strict=True):
            shard = self.decoded(position)
            first, second = (shard.synthetic, shard.original) if wants_synthetic else (shard.original, shard.synthetic)
            caption = int(first[row]) if first[row] >= 0 else int(second[row])
            latents.append(shard.stacked[bucket][shard.place[row]])
            texts.append((shard, caption))
            keys.append(shard.rows.keys[row])
        return Batch(
            latent=torch.stack(latents).float(),
            text=_gather_text(texts),
            sample_ids=np.array([sample_id(key) for key in keys], dtype=np.int64),
            epochs=epochs,
            keys=keys,
            bucket=bucket,
        )

    def keys_of(self, shards: np.ndarray, rows: np.ndarray) -> list[str]:
        return [self.shards[position].keys[row] for position, row in zip(shards.tolist(), rows.tolist(), strict=True)]

    def decoded(self, position: int) -> DecodedShard:
        """A shard in memory; the shards used longest ago make room."""
        with self._lock:
            if position in self._decoded:
                self._decoded.move_to_end(position)
                return self._decoded[position]
        shard = self._decode(self.shards[position])
        with self._lock:
            self._decoded[position] = shard
            while len(self._decoded) > DECODED_SHARDS:
                self._decoded.popitem(last=False)
        return shard

    def _read_rows(self, latents: ShardEntry, text: ShardEntry) -> ShardRows:
        index = _read_checked_index(self.store, self.latents.folder, latents)
        captions: dict[str, dict[str, str]] = {}
        columns = _read_checked_index(self.store, self.text.folder, text).select(["key", "kind", "caption_id"]).to_pydict()
        for key, kind, caption in zip(columns["key"], columns["kind"], columns["caption_id"], strict=True):
            captions.setdefault(key, {})[kind] = caption
        wanted = index.select(["key", "bucket", "split"]).to_pydict()
        return ShardRows(latents, text, wanted["key"], wanted["bucket"], wanted["split"], captions)

    def _decode(self, rows: ShardRows) -> DecodedShard:
        stacks: dict[str, list[Tensor]] = {}
        place = np.zeros(len(rows.keys), dtype=np.int64)
        data = self.cache.read(f"{self.latents.folder}/{rows.latents.stem}.tar", rows.latents.digest)
        for row, (key, files) in enumerate(read_samples(data)):
            if key != rows.keys[row]:
                raise DataError(f"{self.latents.folder}/{rows.latents.stem}: row {row} is {key!r}, its index says {rows.keys[row]!r}")
            stack = stacks.setdefault(rows.buckets[row], [])
            place[row] = len(stack)
            stack.append(load_tensors(files["safetensors"])["latent"])
        features, position = [], {}
        data = self.cache.read(f"{self.text.folder}/{rows.text.stem}.tar", rows.text.digest)
        for caption, files in read_samples(data):
            position[caption] = len(features)
            features.append(TextFeatures.from_bytes(files["safetensors"], clip_tokens=self.clip_tokens, t5_tokens=self.t5_tokens))
        kinds = {
            kind: np.array([position.get(rows.captions.get(key, {}).get(kind, ""), -1) for key in rows.keys], dtype=np.int64)
            for kind in ("original", "synthetic")
        }
        stacked = {bucket: torch.stack(stack) for bucket, stack in stacks.items()}
        return DecodedShard(rows, stacked, place, TextFeatures.stack(features) if features else None, kinds["original"], kinds["synthetic"])


class BatchLoader:
    """`batch(step)`: this rank's consecutive slice of the global batch that the plan has for the step (from 0 on)."""

    def __init__(self, reader: ShardReader, plan: TrainingPlan, *, original_fraction: float, seed: int, rank: int, world: int) -> None:
        self.reader, self.plan, self.original_fraction, self.seed = reader, plan, original_fraction, seed
        share = plan.global_batch // world
        self._slice = slice(rank * share, (rank + 1) * share)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shards-ahead")

    def batch(self, step: int) -> Batch:
        """Original or synthetic caption: by (seed, epoch, sample), so neither ranks nor restarts change it."""
        planned = self.plan.batch(step)
        mine = self._slice
        shards, rows, epochs = planned.shard[mine], planned.row[mine], planned.epoch[mine]
        ids = np.array([sample_id(key) for key in self.reader.keys_of(shards, rows)], dtype=np.int64)
        synthetic = uniform(self.seed, epochs, ids, "caption") >= self.original_fraction
        batch = self.reader.gather(shards, rows, synthetic, epochs, planned.bucket)
        self._ahead.submit(self._warm, step + 1)
        return batch

    def _warm(self, step: int) -> None:
        """Decodes what the next step needs while this one is trained on."""
        for position in np.unique(self.plan.batch(step).shard[self._slice]).tolist():
            self.reader.decoded(position)


def load_split(reader: ShardReader, split: Split, batch: int, limit: int | None = None) -> Iterator[Batch]:
    """The rows of a split in the order of their keys, original captions first choice, in batches of one bucket."""
    table, _ = reader.table(split)
    keys = np.array(reader.keys_of(table.shard, table.row))
    chosen = np.argsort(keys, kind="stable")[:limit]
    for code, bucket in enumerate(table.buckets):
        rows = chosen[table.bucket[chosen] == code]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            none = np.zeros(len(part), dtype=bool)
            yield reader.gather(table.shard[part], table.row[part], none, np.zeros(len(part), dtype=np.int64), bucket)


def _gather_text(chosen: list[tuple[DecodedShard, int]]) -> TextFeatures:
    """Features of (shard, caption) pairs in their order, one index_select a shard."""
    by_shard: dict[int, list[int]] = {}
    for place, (shard, _) in enumerate(chosen):
        by_shard.setdefault(id(shard), []).append(place)
    parts, order = [], []
    for places in by_shard.values():
        shard = chosen[places[0]][0]
        parts.append(shard.text.index(torch.tensor([chosen[place][1] for place in places])))
        order += places
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return TextFeatures.stack(parts).index(back)


def _read_checked_index(store: Store, folder: str, shard: ShardEntry) -> pa.Table:
    index = read_index(store, folder, shard.stem)
    if index.num_rows < shard.rows:
        raise DataError(f"{store.uri(folder)}/{shard.stem}: its index has {index.num_rows} rows, its manifest {shard.rows}; run the stage again")
    return index


def _check_line_up(latents: Manifest, text: Manifest) -> None:
    """Latents and text must come from the same raw shards."""
    numbers = {shard.number for shard in text.shards}
    missing = [str(shard.number) for shard in latents.shards if shard.number not in numbers]
    if missing:
        raise DataError(f"{text.folder}: no text for shards {', '.join(missing[:5])} ({len(missing)} in all); run the encode stage again")
    if latents.inputs.get("raw") != text.inputs.get("raw"):
        raise DataError(f"{latents.folder} and {text.folder} were made from different raw shards; run the encode stage again")
