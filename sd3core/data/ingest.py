"""Ingest: where images and captions come from, cut into shards of raw samples.

A source is listed once, on one machine; each shard is then written by any worker. A shard's digest names its content,
so a changed image or caption gives another shard, and one that stands is not made again. A folder's files go to shards by a
hash of their keys, so that a file more or less touches one shard, and a shard has something of everything.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from sd3core.data.folder_source import FolderItem, Tell, list_folder
from sd3core.data.images import DecodedImage, PixelRules, naming, read_picture
from sd3core.data.shards import (
    IMAGE_DIGEST,
    DoneRecord,
    FailedRow,
    Sample,
    is_held_out,
    parts_digest,
    shard_stem,
    short_digest,
    write_shard,
)
from sd3core.data.slices import deal_slices, slice_hash
from sd3core.data.store import open_store
from sd3core.errors import DataError, UserError, with_mend
from sd3core.recipe import Data
from sd3core.small_world.scenes import describe, draw_scene, render, scene_rng
from sd3core.words import NAMED

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # stored as they are; others become PNG
RAW_SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
    ]
)
FILES_SCHEMA = RAW_SCHEMA.append(pa.field(IMAGE_DIGEST, pa.string()))  # a scene's key names its picture already
HELD_OUT_ROWS = "held out"  # counted in the record of a shard of files
ASPECT, DESCRIBE = 2, 1  # purposes of scene_rng besides drawing, which is 0


@dataclass(frozen=True)
class SourceShard:
    """One shard to be made: scene numbers of the small world, or files of a folder (their paths relative to `root`)."""

    number: int
    digest: str  # 12 hex digits of the content
    items: Sequence[int] | tuple[FolderItem, ...]
    seed: int = 0
    root: str = ""


def list_source(
    data: Data, seed: int, captions_needed: bool = False, tell: Tell = lambda note: None
) -> list[SourceShard]:
    """The shards of the recipe's source, the same for the same content.

    `captions_needed`: an image without caption is rejected, because no captioner will write one. `tell` is called with
    each line that a person should know of a folder's captions. Raises DataError where a folder holds no image that can be
    used.
    """
    if data.source == "small_world":
        return _list_small_world(data, seed)
    notes: list[str] = []
    items = list_folder(data, captions_needed, notes.append)
    _check_usable(data, items, notes)
    for note in notes:
        tell(note)
    root = str(Path(data.folder).expanduser().resolve())
    return [
        SourceShard(number, parts_digest(*(part for item in shard for part in item.content())), shard, root=root)
        for number, shard in _slices_of(items, data.rows_per_shard)
    ]


def _slices_of(items: list[FolderItem], rows: int) -> Iterator[tuple[int, tuple[FolderItem, ...]]]:
    """(slice's number, its items by key), by number."""
    hashes = np.array([slice_hash(item.key) for item in items], dtype=np.uint64)
    for number, positions in deal_slices(hashes, rows).items():
        yield number, tuple(sorted((items[i] for i in positions), key=lambda item: item.key))


def _list_small_world(data: Data, seed: int) -> list[SourceShard]:
    """A scene is a function of (seed, settings, index), so those name a shard's content; a world that grows keeps its
    shards.
    """
    settings = data.model_dump(
        mode="json", include={"image_side_px", "aspect_ratios", "max_objects", "held_out_fraction"}
    )
    shards = []
    for number, start in enumerate(range(0, data.images, data.rows_per_shard)):
        indexes = range(start, min(start + data.rows_per_shard, data.images))
        world = {"seed": seed, "settings": settings, "start": indexes.start, "stop": indexes.stop}
        shards.append(SourceShard(number, parts_digest(json.dumps(world, sort_keys=True)), indexes, seed))
    return shards


def _check_usable(data: Data, items: list[FolderItem], notes: list[str]) -> None:
    """One image that can be used is enough to begin; it is looked for here, before any worker starts."""
    reasons: dict[str, int] = {}
    for item in items:
        try:
            _usable_image(data, Path(data.folder).expanduser(), item)
            return
        except DataError as error:
            reasons[str(error)] = reasons.get(str(error), 0) + 1
    why = "; ".join(
        f"{count} rejected: {reason}" for reason, count in sorted(reasons.items(), key=lambda kv: -kv[1])[:5]
    )
    why = "; ".join([why or "it holds no image file", *notes[:NAMED]])
    raise DataError(f"data.folder {data.folder}: no usable image ({why}); name another folder, or mend that")


class IngestWorker:
    """SourceShard -> raw tar. An image that cannot be used becomes a failed row with its reason."""

    def __init__(self, data: Data, store_url: str, folder: str) -> None:
        self.data, self.store, self.folder = data, open_store(store_url), folder
        self.progress = 0  # rows

    def __call__(self, shard: SourceShard) -> DoneRecord:
        self.progress = 0
        failed: list[FailedRow] = []
        notes: Counter[str] = Counter()
        drawn = self.data.source == "small_world"
        samples = self._scenes(shard) if drawn else self._files(shard, failed, notes)
        stem, schema = shard_stem(shard.number, shard.digest), RAW_SCHEMA if drawn else FILES_SCHEMA
        return write_shard(self.store, self.folder, stem, samples, failed, schema, counts=notes)

    def _scenes(self, shard: SourceShard) -> Iterator[Sample]:
        for index in shard.items:
            aspects = self.data.aspect_ratios
            aspect = aspects[scene_rng(shard.seed, index, ASPECT).integers(len(aspects))]
            scene = draw_scene(shard.seed, index, self.data.image_side_px, aspect, self.data.max_objects)
            image = Image.fromarray(render(scene))
            caption = describe(scene, scene_rng(shard.seed, index, DESCRIBE))
            yield self._sample(
                f"scene-{shard.seed}-{index:08d}", "png", _png(image), image.size, caption, "small_world"
            )
            self.progress += 1

    def _files(self, shard: SourceShard, failed: list[FailedRow], notes: Counter[str]) -> Iterator[Sample]:
        for item in shard.items:
            try:
                picture, extension, stored = _usable_image(self.data, Path(shard.root), item)
                sample = self._sample(item.key, extension, stored, picture.image.size, item.caption, item.name)
                notes.update([*picture.notes, *([HELD_OUT_ROWS] if sample.row["split"] == "held_out" else [])])
                yield replace(sample, row=sample.row | {IMAGE_DIGEST: short_digest(stored)})
            except DataError as error:
                failed.append(FailedRow(key=item.named, reason=str(error)))
            self.progress += 1

    def _sample(
        self, key: str, extension: str, image: bytes, size: tuple[int, int], caption: str, source: str
    ) -> Sample:
        about = {"caption": caption, "width": size[0], "height": size[1], "source": source}
        described = json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
        split = "held_out" if is_held_out(key, self.data.held_out_fraction) else "train"
        return Sample(key, {extension: image, "json": described}, about | {"split": split})


class FolderChanged(UserError):
    """A file is not the one that was listed: a shard made from it would bear the wrong name. Not a reject, the shard
    fails.
    """


def _usable_image(data: Data, root: Path, item: FolderItem) -> tuple[DecodedImage, str, bytes]:
    """The picture, the extension and the bytes it is stored with. DataError with the reason it cannot be used."""
    if item.problem:
        raise DataError(item.problem)
    try:
        content = (root / item.path).read_bytes()
    except FileNotFoundError:
        content = b""
    except OSError as error:  # of the disk or the machine: no reject, the shard fails and is tried again
        raise UserError(f"{root / item.path}: {with_mend(error)}") from None
    if hashlib.sha256(content).hexdigest() != item.sha256:
        raise FolderChanged(
            f"{root / item.path} changed since the folder was listed; run ingest again when it is at rest"
        )
    with naming(item.name):
        picture = read_picture(content, PixelRules.of(data))
    if min(picture.image.size) < data.min_side_px:
        raise DataError(f"a side is shorter than {data.min_side_px} px (data.min_side_px)")
    if picture.format in KEPT_FORMATS:
        return picture, KEPT_FORMATS[picture.format], content
    return picture, "png", _png(picture.image)


def _png(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()
