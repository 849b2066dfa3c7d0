"""Joins latents and text shard by shard, and gathers rows into batches.

Indexes are checked, tensors decoded once.

Every file is checked against the digest in its manifest before it is used.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import SafetensorError
from torch import Tensor

from sd3core.conditioning import TextFeatures
from sd3core.data.encoded_shards import CAPTION_KINDS, FEATURES, Split, latent_of
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.shard_cache import ShardCache
from sd3core.data.shards import read_samples, read_shard_index, sample_id
from sd3core.data.store import Store, StoreNotFound
from sd3core.data.training_plan import WINDOW_SHARDS, PlanTable
from sd3core.errors import DataError
from sd3core.specs import TAR

INDEX_THREADS = 16
DECODED_BYTES = 8e9  # of decoded shards in memory; a window of the plan's shards should fit
NAMED_SHARDS = 5  # shards that an error names


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
    """What one shard's indexes say about its rows, kept for all shards at once."""

    latents: ShardEntry
    text: ShardEntry
    keys: pa.ChunkedArray
    buckets: list[str]  # of this shard
    bucket: np.ndarray  # (rows,) index into `buckets`
    splits: pa.ChunkedArray
    captioned: np.ndarray  # (rows,) bool


@dataclass(frozen=True, eq=False)
class DecodedShard:
    """A shard's tensors: latents stacked by bucket, every distinct caption's features stacked once."""

    keys: list[str]
    latents: dict[str, Tensor]  # bucket -> (n, 16, h, w)
    place: np.ndarray  # (rows,) position within the row's bucket
    text: TextFeatures | None
    captions: np.ndarray  # (rows, 2) position in `text` by KINDS, -1 where there is none

    @property
    def bytes(self) -> int:
        tensors = list(self.latents.values())
        tensors += [getattr(self.text, f.name) for f in fields(TextFeatures)] if self.text is not None else []
        return sum(tensor.nbytes for tensor in tensors)


class ShardReader:
    """Joins the latents and the text of one data set, shard by shard. Shards line up by their numbers.

    Raises DataError, naming the first few shards and how many there are, where the manifests do not line up or an index
    is not the one that its manifest names.
    """

    def __init__(
        self,
        store: Store,
        latents: Manifest,
        text: Manifest,
        cache: ShardCache,
        *,
        clip_tokens: int,
        t5_tokens: int,
        decoded_bytes: float = DECODED_BYTES,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`warn` hears once where the shards that a step draws from do not fit into `decoded_bytes`."""
        _check_line_up(latents, text, {"clip_tokens": clip_tokens, "t5_tokens": t5_tokens})
        self.store, self.latents, self.text, self.cache = store, latents, text, cache
        self.clip_tokens, self.t5_tokens, self.decoded_bytes = clip_tokens, t5_tokens, decoded_bytes
        self._warn: Callable[[str], None] | None = warn
        self.shards = self._read_indexes()
        self._decoded: OrderedDict[int, Future[DecodedShard]] = OrderedDict()
        self._lock = threading.Lock()

    def table(self, split: Split = "train") -> tuple[PlanTable, int]:
        """Rows of the split that have a caption, and how many were left out for having none."""
        names = sorted({bucket for shard in self.shards for bucket in shard.buckets})
        columns: list[np.ndarray] = [np.zeros((3, 0), dtype=np.int64)]
        without = 0
        for position, shard in enumerate(self.shards):
            wanted = pc.equal(shard.splits, split).to_numpy()
            without += int((wanted & ~shard.captioned).sum())
            rows = np.flatnonzero(wanted & shard.captioned)
            codes = np.array([names.index(bucket) for bucket in shard.buckets], dtype=np.int64)
            columns.append(np.stack([np.full(len(rows), position), rows, codes[shard.bucket[rows]]]))
        shards, rows, buckets = np.concatenate(columns, axis=1)
        return PlanTable(shards, rows, buckets, tuple(names)), without

    def gather(
        self, shards: np.ndarray, rows: np.ndarray, synthetic: np.ndarray, epochs: np.ndarray, bucket: str
    ) -> Batch:
        """Rows as a batch. `synthetic` (B,) bool: which caption is wanted; where there is only one, it is taken."""
        latents, texts, order = [], [], []
        for position in np.unique(shards).tolist():
            shard, places = self.decoded(position), np.flatnonzero(shards == position)
            chosen, wanted = shard.captions[rows[places]], synthetic[places].astype(np.int64)  # (n, 2), (n,)
            first, second = chosen[np.arange(len(places)), wanted], chosen[np.arange(len(places)), 1 - wanted]
            latents.append(shard.latents[bucket][torch.from_numpy(shard.place[rows[places]])])
            texts.append(shard.text.index(torch.from_numpy(np.where(first >= 0, first, second))))
            order.append(places)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        keys = self.keys_of(shards, rows)
        ids = np.array([sample_id(key) for key in keys], dtype=np.int64)
        return Batch(torch.cat(latents)[back].float(), TextFeatures.stack(texts).index(back), ids, epochs, keys, bucket)

    def keys_of(self, shards: np.ndarray, rows: np.ndarray) -> list[str]:
        pairs = zip(shards.tolist(), rows.tolist(), strict=True)
        return [self.shards[position].keys[row].as_py() for position, row in pairs]

    def find(self, number: int, key: str) -> tuple[int, int, str] | None:
        """(position of the shard, row, bucket) of a sample; None where it has no caption or is not there."""
        for position, shard in enumerate(self.shards):
            row = pc.index(shard.keys, key).as_py() if shard.latents.number == number else -1
            if row >= 0 and shard.captioned[row]:
                return position, row, shard.buckets[shard.bucket[row]]
        return None

    def decoded(self, position: int) -> DecodedShard:
        """A shard in memory. Each is decoded by one thread while others wait; those used longest ago make room.

        A failure is raised to the thread whose attempt it was. One that only waited makes an attempt of its own, so that
        what went wrong for a moment while fetching ahead does not stop a training step.
        """
        while True:
            with self._lock:
                future = self._decoded.get(position)
                mine = future is None
                if mine:
                    future = self._decoded[position] = Future()
                self._decoded.move_to_end(position)
            if mine:
                return self._decode_into(future, position)
            if future.exception() is None:  # waits for the other thread
                return future.result()

    def _decode_into(self, future: Future[DecodedShard], position: int) -> DecodedShard:
        try:
            shard = self._decode(self.shards[position])
        except BaseException as error:
            with self._lock:
                del self._decoded[position]
            future.set_exception(error)
            raise
        future.set_result(shard)
        self._make_room()
        return shard

    def _make_room(self) -> None:
        with self._lock:
            done = {p: f.result().bytes for p, f in self._decoded.items() if f.done() and f.exception() is None}
            total = sum(done.values())
            for position in list(done)[:-1]:
                if total <= self.decoded_bytes:
                    break
                if len(done) <= self._window:
                    self._warn_of_a_small_cache(total / len(done))
                total -= done.pop(position)
                del self._decoded[position]

    @property
    def _window(self) -> int:
        """The shards that a step draws from: the plan's window moves by less than one while they are read."""
        return min(WINDOW_SHARDS + 1, len(self.shards))

    def _warn_of_a_small_cache(self, shard_bytes: float) -> None:
        if self._warn is not None:
            needed = math.ceil(self._window * shard_bytes / 1e8) / 10
            self._warn(
                f"a step draws from {self._window} shards of {shard_bytes / 1e9:.3g} GB, and compute.decoded_gb"
                f" {self.decoded_bytes / 1e9:.3g} holds fewer, so that each is decoded again in every step: set it to"
                f" {needed:.1f}, or take fewer data.rows_per_shard"
            )
            self._warn = None

    def _read_indexes(self) -> list[ShardRows]:
        by_number = {shard.number: shard for shard in self.text.shards}

        def read(latents: ShardEntry) -> ShardRows | DataError:
            try:
                return self._read_rows(latents, by_number[latents.number])
            except DataError as error:
                return error

        with ThreadPoolExecutor(INDEX_THREADS, thread_name_prefix="index") as threads:
            found = list(threads.map(read, self.latents.shards))
        errors = [str(error) for error in found if isinstance(error, DataError)]
        if errors:
            more = f"; and {len(errors) - NAMED_SHARDS} more" if len(errors) > NAMED_SHARDS else ""
            raise DataError(
                f"{len(errors)} of {len(found)} shards cannot be trained on: {'; '.join(errors[:NAMED_SHARDS])}{more}"
            )
        return found

    def _read_rows(self, latents: ShardEntry, text: ShardEntry) -> ShardRows:
        index = _read_checked_index(self.store, self.latents.folder, latents)
        captioned = _read_checked_index(self.store, self.text.folder, text)["key"]
        buckets = index["bucket"].combine_chunks().dictionary_encode()
        return ShardRows(
            latents,
            text,
            keys=index["key"],
            buckets=buckets.dictionary.to_pylist(),
            bucket=buckets.indices.to_numpy(zero_copy_only=False).astype(np.int64),
            splits=index["split"],
            captioned=pc.is_in(index["key"], value_set=captioned.combine_chunks()).to_numpy(),
        )

    def _decode(self, rows: ShardRows) -> DecodedShard:
        keys = rows.keys.to_pylist()
        latents, place = self._decode_latents(rows, keys)
        text, position = self._decode_text(rows.text)
        row_of, captions = (
            {key: row for row, key in enumerate(keys)},
            np.full((len(keys), len(CAPTION_KINDS)), -1, dtype=np.int64),
        )
        index = (
            _read_checked_index(self.store, self.text.folder, rows.text)
            .select(["key", "kind", "caption_id"])
            .to_pydict()
        )
        for key, kind, caption in zip(index["key"], index["kind"], index["caption_id"], strict=True):
            if caption not in position:
                raise DataError(
                    f"{self.text.folder}/{rows.text.stem}: caption {caption} of {key} is in the index, not in the tar;"
                    " run the encode stage again"
                )
            if key in row_of:  # else its image could not be encoded
                captions[row_of[key], CAPTION_KINDS.index(kind)] = position[caption]
        return DecodedShard(keys, latents, place, text, captions)

    def _decode_latents(self, rows: ShardRows, keys: list[str]) -> tuple[dict[str, Tensor], np.ndarray]:
        where = f"{self.latents.folder}/{rows.latents.stem}"
        stacks: dict[str, list[Tensor]] = {}
        place = np.zeros(len(keys), dtype=np.int64)
        samples = list(read_samples(self.cache.read(f"{where}{TAR}", rows.latents.digest)))
        if [key for key, _ in samples] != keys:
            raise DataError(f"{where}: the tar's rows are not those of its index; run encode again")
        for row, (key, files) in enumerate(samples):
            bucket = rows.buckets[rows.bucket[row]]
            stack = stacks.setdefault(bucket, [])
            place[row] = len(stack)
            stack.append(_latent(files, bucket, f"{where}: {key}"))
        return {bucket: torch.stack(stack) for bucket, stack in stacks.items()}, place

    def _decode_text(self, entry: ShardEntry) -> tuple[TextFeatures | None, dict[str, int]]:
        """The features of every distinct caption, and where each caption id stands in them."""
        features, position = [], {}
        data = self.cache.read(f"{self.text.folder}/{entry.stem}{TAR}", entry.digest)
        for caption, files in read_samples(data):
            position[caption] = len(features)
            features.append(
                TextFeatures.from_bytes(files[FEATURES], clip_tokens=self.clip_tokens, t5_tokens=self.t5_tokens)
            )
        return TextFeatures.stack(features) if features else None, position


def _latent(files: dict[str, bytes], bucket: str, where: str) -> Tensor:
    height, width = map(int, bucket.split("x"))
    try:
        latent = latent_of(files[FEATURES])
    except (KeyError, SafetensorError):
        raise DataError(f"{where} holds no latent; run encode again") from None
    if tuple(latent.shape[1:]) != (height // 8, width // 8):
        raise DataError(f"{where} has a latent of {tuple(latent.shape)}, its bucket is {bucket} px; run encode again")
    return latent


def _read_checked_index(store: Store, folder: str, shard: ShardEntry) -> pa.Table:
    where = f"{store.uri(folder)}/{shard.stem}"
    try:
        index = read_shard_index(store, folder, shard.stem, shard.index_digest)
    except StoreNotFound:
        raise DataError(f"{where}: its index is gone; delete its done record and run the stage again") from None
    if index.num_rows != shard.rows:
        raise DataError(f"{where}: its index has {index.num_rows} rows, its manifest {shard.rows}; run the stage again")
    return index


def _check_line_up(latents: Manifest, text: Manifest, tokens: dict[str, int]) -> None:
    """Latents and text must be those, complete, and made from the same raw shards with the token counts asked for."""
    for manifest, stage in ((latents, "latents"), (text, "text")):
        if manifest.stage != stage:
            raise DataError(f"{manifest.folder}: a manifest of {manifest.stage}, where one of {stage} is needed")
    if latents.inputs.get("raw") != text.inputs.get("raw"):
        raise DataError(
            f"{latents.folder} and {text.folder} were made from different raw shards; run the encode stage again"
        )
    for there, absent in ((latents, text), (text, latents)):
        missing = sorted({shard.number for shard in there.shards} - {shard.number for shard in absent.shards})
        if missing:
            rows = sum(shard.rows for shard in there.shards if shard.number in missing)
            raise DataError(
                f"{absent.folder}: no {absent.stage} for {rows} rows of {there.stage}, in shards {_first(missing)}"
                f" ({len(missing)} in all); run the encode stage again"
            )
    made_with = text.fields.get("text", {})
    for name, count in tokens.items():
        if made_with.get(name, count) != count:
            raise DataError(
                f"{text.folder}: encoded with text.{name} {made_with[name]}, {count} is asked for;"
                " run the encode stage again"
            )


def _first(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED_SHARDS])) + (", …" if len(numbers) > NAMED_SHARDS else "")
