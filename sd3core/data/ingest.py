"""Where raw shards come from: a user's folder of images with captions, or the small world.

`list_source` says what the shards will hold and names their content by a digest; `IngestWorker` makes one shard. A row that
cannot be used is a FailedRow with its reason; the rest goes on.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image

from sd3core.data.images import decode_image, encode_png_lossless, stored_extension
from sd3core.data.shards import DoneRecord, FailedRow, Sample, content_digest, is_held_out, shard_stem, write_shard
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.recipe import Data
from sd3core.small_world.scenes import describe, draw_scene, render, scene_rng
from sd3core.specs import fingerprint

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"
NO_CAPTION = "no caption (name a captioner in caption.captioner)"
HASHING_THREADS = 8
SHOWN = 60  # characters of a key that stay readable

RAW_SCHEMA = pa.schema(
    [
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True)
class SourceItem:
    """One image to be: a file with its caption, or the index of a scene. `rejected` says why a row cannot be used."""

    key: str
    path: str = ""
    caption: str = ""
    content: str = ""  # sha256 of the file
    index: int = -1
    rejected: str = ""


@dataclass(frozen=True)
class SourceShard:
    number: int
    digest: str
    items: tuple[SourceItem, ...]
    seed: int = 0


def list_source(data: Data, seed: int, captions_needed: bool) -> list[SourceShard]:
    """The shards that the recipe's source gives, in order. DataError if it gives no row at all."""
    if data.source == "small_world":
        return _list_small_world(data, seed)
    return _list_folder(data, captions_needed)


def _list_small_world(data: Data, seed: int) -> list[SourceShard]:
    settings = data.model_dump(mode="json", include={"image_side_px", "aspect_ratios", "max_objects"})
    shards = []
    for number, start in enumerate(range(0, data.images, data.rows_per_shard)):
        indices = range(start, min(start + data.rows_per_shard, data.images))
        digest = fingerprint({"seed": seed, "world": settings, "start": indices.start, "stop": indices.stop})
        shards.append(SourceShard(number, digest, tuple(SourceItem(f"{i:09d}", index=i) for i in indices), seed))
    return shards


def _list_folder(data: Data, captions_needed: bool) -> list[SourceShard]:
    folder = Path(data.folder or "").expanduser()
    if not folder.is_dir():
        raise DataError(f"data.folder {data.folder!r}: no such folder")
    items = sorted(_folder_items(folder, data, captions_needed), key=lambda item: item.key)
    if not items:
        raise DataError(f"data.folder {data.folder!r}: no image in it ({', '.join(sorted(IMAGE_SUFFIXES))} or a {METADATA})")
    if all(item.rejected for item in items):
        raise DataError(f"data.folder {data.folder!r}: none of its {len(items)} images can be used; the first: {items[0].path}: {items[0].rejected}")
    shards = []
    for number, start in enumerate(range(0, len(items), data.rows_per_shard)):
        part = tuple(items[start : start + data.rows_per_shard])
        digest = content_digest(*(f"{i.key}\n{i.content}\n{i.caption}\n{i.rejected}" for i in part))
        shards.append(SourceShard(number, digest, part))
    return shards


def _folder_items(folder: Path, data: Data, captions_needed: bool) -> list[SourceItem]:
    root = folder.resolve()
    listed = _read_metadata(root / METADATA) if (root / METADATA).is_file() else None
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not _hidden(p.relative_to(root)))
    items: list[SourceItem] = []
    if listed is not None:
        items += [SourceItem(f"line-{line:06d}", METADATA, rejected=reason) for line, reason in listed.bad_lines]
        known = {path.relative_to(root).as_posix() for path in paths}
        items += [SourceItem(_key(name), name, rejected=f"{METADATA} names it, but there is no such image") for name in listed.captions if name not in known]

    def item(path: Path) -> SourceItem | None:
        name = path.relative_to(root).as_posix()
        if listed is not None and name not in listed.captions:
            return SourceItem(_key(name), name, rejected=f"not in {METADATA}")
        if not path.resolve().is_relative_to(root):
            return SourceItem(_key(name), name, rejected="a link that leads out of the folder")
        try:
            caption = _clean_caption(listed.captions[name] if listed else _read_caption(path), data.max_caption_chars)
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, UnicodeDecodeError) as error:
            reason = "its caption is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"unreadable file ({error.strerror})"
            return SourceItem(_key(name), name, rejected=reason)
        rejected = NO_CAPTION if captions_needed and not caption else ""
        return SourceItem(_key(name), str(path), caption, content, rejected=rejected)

    with ThreadPoolExecutor(HASHING_THREADS, thread_name_prefix="hash") as threads:
        return items + [found for found in threads.map(item, paths) if found is not None]


@dataclass(frozen=True)
class _Metadata:
    captions: dict[str, str]  # file name -> text
    bad_lines: list[tuple[int, str]]


def _read_metadata(path: Path) -> _Metadata:
    captions: dict[str, str] = {}
    bad: list[tuple[int, str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name, text = fields["file_name"], fields["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            bad.append((number, f"{METADATA} line {number}: not an object with the strings file_name and text"))
            continue
        if name in captions:
            bad.append((number, f"{METADATA} line {number}: {name} stands twice"))
            continue
        captions[name] = text
    return _Metadata(captions, bad)


def _read_caption(path: Path) -> str:
    beside = path.with_suffix(".txt")
    return beside.read_text(encoding="utf-8") if beside.is_file() else ""


def _clean_caption(text: str, longest: int) -> str:
    """One line without control characters, cut at a word."""
    text = " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") else c for c in text).split())
    if len(text) <= longest:
        return text
    return text[: longest + 1].rsplit(" ", 1)[0][:longest]


def _key(name: str) -> str:
    """A name for tars, the same for ever: the readable part, and a hash of the whole so that no two files share it."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", name.rsplit(".", 1)[0]).strip("_")[-SHOWN:] or "image"
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


class IngestWorker:
    """Makes one raw shard. `progress` counts rows, for whoever watches."""

    def __init__(self, data: Data, store_url: str, folder: str) -> None:
        self.data, self.store, self.folder = data, open_store(store_url), folder
        self.progress = 0

    def __call__(self, shard: SourceShard) -> DoneRecord:
        failed: list[FailedRow] = []
        samples = self._samples(shard, failed)
        return write_shard(self.store, self.folder, shard_stem(shard.number, shard.digest), samples, failed, RAW_SCHEMA, count_by="split")

    def _samples(self, shard: SourceShard, failed: list[FailedRow]) -> Iterator[Sample]:
        for item in shard.items:
            self.progress += 1
            try:
                yield self._scene(item, shard.seed) if item.index >= 0 else self._photograph(item)
            except DataError as error:
                failed.append(FailedRow(key=item.key, reason=str(error)))

    def _scene(self, item: SourceItem, seed: int) -> Sample:
        data = self.data
        aspect = data.aspect_ratios[item.index % len(data.aspect_ratios)]
        scene = draw_scene(seed, item.index, data.image_side_px, aspect, data.max_objects)
        caption = describe(scene, scene_rng(seed, item.index, 1))
        picture = Image.fromarray(render(scene))
        return self._sample(item.key, "png", encode_png_lossless(picture), picture, caption, "small_world")

    def _photograph(self, item: SourceItem) -> Sample:
        if item.rejected:
            raise DataError(item.rejected)
        bytes_ = Path(item.path).read_bytes()
        picture = decode_image(bytes_, self.data.max_image_pixels)
        if min(picture.size) < self.data.min_side_px:
            raise DataError(f"a side is shorter than data.min_side_px {self.data.min_side_px}")
        extension = stored_extension(bytes_)
        if extension is None:
            extension, bytes_ = "png", encode_png_lossless(picture)
        return self._sample(item.key, extension, bytes_, picture, item.caption, Path(item.path).name)

    def _sample(self, key: str, extension: str, bytes_: bytes, picture: Image.Image, caption: str, source: str) -> Sample:
        facts = {"caption": caption, "width": picture.width, "height": picture.height, "source": source}
        split = "held_out" if is_held_out(key, self.data.held_out_fraction) else "train"
        meta = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
        return Sample(key, {extension: bytes_, "json": meta}, {**facts, "split": split})
