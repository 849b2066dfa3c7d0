"""Encodes the images of one shard into VAE latents, a bucket at a time.

Threads decode ahead of the encoding.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sd3core.buckets import Side, bucket_name, bucket_side, nearest_bucket
from sd3core.data.earlier_rows import EarlierRow, EarlierRows, RowName, row_name
from sd3core.data.encoded_shards import FEATURES, LATENT_SCHEMA, held_out_count, latent_bytes
from sd3core.data.images import Crop, PixelRules, crop_to, decode_image, enlargement, naming, to_model_range
from sd3core.data.ingest import captions_column
from sd3core.data.manifest import ManifestRef
from sd3core.data.settled_precision import SettledPrecision
from sd3core.data.shards import FailedRow, Sample, write_shard
from sd3core.data.size_rule import TOO_SMALL, SizeRule
from sd3core.data.store import Store
from sd3core.errors import DataError, StoreError
from sd3core.flip_rule import why_not_flipped
from sd3core.progress import ProgressCallback, ignore_progress
from sd3core.towers.artifact import fetch_towers
from workers.at_once import ShardsAtOnce, ShardTurn, WorkerAtOnce
from workers.caches import towers_cache
from workers.inputs import (
    InputShard,
    image_digest,
    map_ahead,
    read_input_index,
    read_input_table,
    shard_images,
    with_image_digest,
)
from workers.shard_stage import MadeShard, ShardTask

if TYPE_CHECKING:
    import torch

# Counted beside the buckets. A bucket's sides are whole patches, which alone stretches an image by some percent.
ENLARGED = {over: f"enlarged over {over:g} times" for over in (1.1, 2.0, 4.0, 8.0)}


FLIPPED = "flipped too"  # counted beside the buckets, as are those that train and are not, by the reason
NOT_FLIPPED = "not flipped: "
FLIPPED_COLUMN = pa.field("flipped", pa.bool_())  # of an index whose images may be


@dataclass(frozen=True)
class FlipSource:
    """What says which of a shard's images may be flipped, beside the captions of the raw shard."""

    captions: InputShard | None


@dataclass(frozen=True)
class LatentsSource:
    raw: InputShard
    sizes: SizeRule
    # buckets whose images go to another (workers.rare_sizes)
    merged: dict[Side, Side] = field(default_factory=dict)
    flip: FlipSource | None = None

    def too_small(self, index: pa.Table) -> set[str]:
        """The keys of a raw index whose images the phase leaves out."""
        if not self.sizes.min_scale:
            return set()
        return {*index["key"].to_pylist()} - {*self.sizes.taken_of(index)["key"].to_pylist()}

    def bucket_of(self, width: int, height: int) -> Side:
        nearest = nearest_bucket(width, height, self.sizes.sides)
        return self.merged.get(nearest, nearest)

    def latent_name(self, row: dict[str, Any]) -> tuple[RowName, str]:
        """Image and bucket of a row of the raw index: an earlier latent of the image may be of another bucket than today's."""
        return row_name(row), bucket_name(self.bucket_of(row["width"], row["height"]))


@dataclass(frozen=True)
class Flips:
    """Which of a shard's images have a latent of the flipped image too, and why others that train have not."""

    asked: bool = False
    flipped: frozenset[str] = frozenset()
    kept: dict[str, str] = field(default_factory=dict)

    def count(self, key: str, counts: Counter[str]) -> None:
        if key in self.flipped:
            counts[FLIPPED] += 1
        elif key in self.kept:
            counts[NOT_FLIPPED + self.kept[key]] += 1


@dataclass(frozen=True)
class Prepared:
    """A decoded and cropped image, or why there is none."""

    key: str
    bucket: Side | None = None
    pixels: np.ndarray | None = None  # (H, W, 3) uint8
    crop: Crop | None = None
    enlarged: float = 0.0  # times, each way
    error: str | None = None
    stood: EarlierRow | None = None  # its latent is taken over

    @property
    def nbytes(self) -> int:
        return 0 if self.pixels is None else self.pixels.nbytes


class LatentsWorker(WorkerAtOnce):
    """Raw shard -> latents tar, in batches of one bucket; threads decode ahead of the encoding. Several threads may call it.

    Latents that stand in earlier shards are taken over, in the places that they would have if they were made.
    """

    def __init__(
        self,
        store: Store,
        towers: ManifestRef,
        dtype: str,
        batch: int,
        rules: PixelRules,
        threads: int,
        device: str,
        precision: SettledPrecision,
        at_once: ShardsAtOnce,
        report: ProgressCallback = ignore_progress,  # of fetching the autoencoder
    ) -> None:
        # here, so that a text worker does not load diffusers, nor the process that hands out shards torch
        import torch

        from sd3core.precision import PRECISION_DTYPES
        from sd3core.towers.autoencoder import load_autoencoder

        self.store, self.batch, self.threads = store, batch, threads
        self.rules, self.at_once = rules, at_once
        self.dtype = getattr(torch, dtype)
        local = fetch_towers(store, towers.folder, towers_cache(), ("vae",), towers.digest, report)
        self.autoencoder = load_autoencoder(local, PRECISION_DTYPES[precision], device)

    def _made(self, task: ShardTask, turn: ShardTurn) -> MadeShard:
        index = read_input_index(self.store, task.source.raw)
        too_small = task.source.too_small(index)
        rows = {row["key"]: row for row in index.to_pylist() if row["key"] not in too_small}
        failed = [FailedRow(key=key, reason=TOO_SMALL) for key in index["key"].to_pylist() if key in too_small]
        turn.advance(len(failed))
        counts: Counter[str] = Counter()
        flips = self._flips(task.source.flip, index) if task.source.flip else Flips()
        with EarlierRows(self.store, task.folder, task.earlier) as earlier:
            # an earlier latent may lack the flipped one, or have one that captions of today do not allow
            name_of = lambda key, row: (*task.source.latent_name(row), key in flips.flipped)
            names = {key: name_of(key, row) for key, row in rows.items()} if task.earlier else {}
            stored_as = lambda row: (row_name(row), row["bucket"], row.get(FLIPPED_COLUMN.name, False))
            found = earlier.find({*names.values()}, stored_as)
            stood = {key: found[name] for key, name in names.items() if name in found}
            samples = self._samples(task.source, rows, stood, failed, counts, turn, flips)
            samples = in_bucket_order(samples, list(rows), counts)
            schema = with_image_digest(LATENT_SCHEMA, index)
            schema = schema.append(FLIPPED_COLUMN) if flips.asked else schema
            record = write_shard(
                self.store, task.folder, task.stem, samples, failed, schema, count_by="bucket", counts=counts
            )
        return MadeShard(record, len(stood), len(rows) - len(stood), tuple(earlier.told))

    def _flips(self, source: FlipSource, index: pa.Table) -> Flips:
        """Of the images that train, by all the captions that they have."""
        captions = dict(zip(index["key"].to_pylist(), captions_column(index), strict=True))
        if source.captions:
            synthetic = read_input_table(self.store, source.captions)
            for key, caption in zip(synthetic["key"].to_pylist(), synthetic["caption"].to_pylist(), strict=True):
                captions[key] = [*captions.get(key, []), caption]
        splits = zip(index["key"].to_pylist(), index["split"].to_pylist(), strict=True)
        why_not = {key: why_not_flipped(captions[key]) for key, split in splits if split == "train"}
        flipped = frozenset(key for key, why in why_not.items() if why is None)
        return Flips(True, flipped, {key: why for key, why in why_not.items() if why is not None})

    def _samples(
        self,
        source: LatentsSource,
        rows: dict[str, dict[str, Any]],
        stood: dict[str, EarlierRow],
        failed: list[FailedRow],
        counts: Counter[str],
        turn: ShardTurn,
        flips: Flips,
    ) -> Iterator[Sample]:
        """`rows`: those of the raw index, by key. `stood`: latents that are taken over, likewise, in the order of those made."""
        waiting: dict[Side, list[Prepared]] = {}

        def prepare(image: tuple[str, bytes]) -> Prepared:
            earlier = stood.get(image[0])
            if earlier:
                return _taken_over(rows[image[0]], earlier)
            prepared = self._prepare(*image, source)
            turn.hold(prepared.nbytes)
            return prepared

        if rows.keys() <= stood.keys():  # then no image is fetched
            fetched, images = 0, ((key, b"") for key in rows)
        else:
            fetched = source.raw.bytes
            images = (image for image in shard_images(self.store, source.raw) if image[0] in rows)
        turn.hold(fetched)
        for item in map_ahead(prepare, images, self.threads, ahead=2 * self.batch):
            if item.error:
                failed.append(FailedRow(key=item.key, reason=item.error))
                turn.advance(1)
                continue
            batch = waiting.setdefault(item.bucket, [])
            batch.append(item)
            if len(batch) == self.batch:
                yield from self._encoded(waiting.pop(item.bucket), rows, failed, counts, turn, flips)
        turn.let_go(fetched)
        for batch in waiting.values():
            yield from self._encoded(batch, rows, failed, counts, turn, flips)

    def _prepare(self, key: str, data: bytes, source: LatentsSource) -> Prepared:
        try:
            with naming(key):
                image = decode_image(data, self.rules)
        except DataError as error:
            return Prepared(key, error=str(error))
        bucket = source.bucket_of(image.width, image.height)
        pixels, crop = crop_to(image, *bucket)
        return Prepared(key, bucket, pixels, crop, enlargement(image.size, *bucket))

    def _encoded(
        self,
        batch: list[Prepared],
        rows: dict[str, dict[str, Any]],
        failed: list[FailedRow],
        counts: Counter[str],
        turn: ShardTurn,
        flips: Flips,
    ) -> Iterator[Sample]:
        new = [item for item in batch if item.stood is None]
        latents = self._latents([item.pixels for item in new], turn)
        flipped = self._latents([item.pixels[:, ::-1] for item in new if item.key in flips.flipped], turn)
        turn.let_go(sum(item.nbytes for item in batch))
        for item in batch:
            if item.stood is not None:
                data = item.stood.files()[FEATURES]
            else:
                latent = next(latents)  # (16, H/8, W/8)
                other = next(flipped) if item.key in flips.flipped else None
                if not all(bool(z.isfinite().all()) for z in (latent, other) if z is not None):
                    failed.append(FailedRow(key=item.key, reason=f"its latent is not finite in {self.dtype}"))
                    continue
                data = latent_bytes(latent, other)
            flips.count(item.key, counts)
            counts.update(name for over, name in ENLARGED.items() if item.enlarged > over)
            columns = _columns(item, rows[item.key], data)
            columns |= {FLIPPED_COLUMN.name: item.key in flips.flipped} if flips.asked else {}
            yield Sample(item.key, {FEATURES: data}, columns)
        turn.advance(len(batch))

    def _latents(self, pixels: list[np.ndarray], turn: ShardTurn) -> Iterator[torch.Tensor]:
        """Of pictures of one bucket, which meet the autoencoder together."""
        if not pixels:
            return iter(())
        images = to_model_range(np.stack(pixels))  # (B, 3, H, W)
        with turn.encoding():
            latents = self.autoencoder.encode(images).to("cpu", self.dtype)  # (B, 16, H/8, W/8)
        return iter(latents)


def _taken_over(row: dict[str, Any], stood: EarlierRow) -> Prepared:
    """A row of the raw index whose latent stands in an earlier shard of the same buckets."""
    bucket = bucket_side(stood.row["bucket"])
    crop = Crop(*(stood.row[f"crop_{side}"] for side in ("top", "left", "height", "width")))
    enlarged = enlargement((row["width"], row["height"]), *bucket)
    return Prepared(row["key"], bucket, crop=crop, enlarged=enlarged, stood=stood)


def _columns(item: Prepared, row: dict[str, Any], data: bytes) -> dict[str, Any]:
    """What the index says of a latent, `row` what the raw one does; `data`: the file."""
    crop = item.crop
    return {
        "bucket": bucket_name(item.bucket),
        "sha256": hashlib.sha256(data).digest(),
        "crop_top": crop.top,
        "crop_left": crop.left,
        "crop_height": crop.height,
        "crop_width": crop.width,
        "split": row["split"],
        **image_digest(row_name(row)),
    }


def in_bucket_order(samples: Iterable[Sample], keys: list[str], counts: Counter[str]) -> Iterator[Sample]:
    """The samples by bucket, those to train on first, then as `keys`, the raw shard, has them; counts the held-out ones.

    Their latents wait on disk: of a shard of large images they are a gigabyte.
    """
    place = {key: number for number, key in enumerate(keys)}
    waiting: list[tuple[str, bool, int, int, int, Sample]] = []
    with tempfile.TemporaryFile(prefix="sd3-latents-") as spool:
        for sample in samples:
            held_out, data = sample.row["split"] == "held_out", sample.files[FEATURES]
            if held_out:
                counts[held_out_count(sample.row["bucket"])] += 1
            order = (sample.row["bucket"], held_out, place[sample.key])
            waiting.append((*order, spool.tell(), len(data), replace(sample, files={})))
            _spool(spool, data)
        for *_, start, length, sample in sorted(waiting, key=lambda item: item[:3]):
            spool.seek(start)
            yield replace(sample, files={FEATURES: spool.read(length)})


def _spool(spool: IO[bytes], data: bytes) -> None:
    try:
        spool.write(data)
        spool.flush()
    except OSError as error:
        raise StoreError(f"temporary folder {tempfile.gettempdir()} (TMPDIR): {error.strerror or error}") from None
