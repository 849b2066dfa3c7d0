"""Makes raw shards of a folder's files: only new or changed ones are opened.

What was seen of them before, and the shards that were made of it, stand in the store (`seen_files`). An image whose bytes are as
they were is taken from its earlier shard. A shard's digest names its content, so a file that was only touched makes no other one.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa

from sd3core.data.caption_text import as_stored
from sd3core.data.earlier_rows import EarlierRow, EarlierRows, RowName, row_name
from sd3core.data.folder_captions import FolderChanged, ListedFile, ListedImage
from sd3core.data.folder_listing import RACY_NS
from sd3core.data.folder_source import FolderItem, FolderSlice, caption_facts, read_item
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.image_files.listed_table import ListedTable, TableSlice
from sd3core.data.images import DecodedImage, PixelRules, naming, read_picture
from sd3core.data.ingest import RAW_SCHEMA, png_bytes, raw_sample
from sd3core.data.seen_files import UNKNOWN_TIME, SeenRow, SeenSlice, read_seen_rows, write_seen_rows
from sd3core.data.shards import (
    IMAGE_DIGEST,
    IMAGE_EXTENSIONS,
    DoneRecord,
    FailedRow,
    Sample,
    parts_digest,
    read_shard_done,
    shard_stem,
    short_digest,
    write_shard,
)
from sd3core.data.store import open_store
from sd3core.errors import DataError, UserError, with_mend
from sd3core.recipe import Data
from sd3core.specs import DONE
from sd3core.words import NAMED

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # stored as they are; others become PNG
FILES_SCHEMA = RAW_SCHEMA.append(pa.field(IMAGE_DIGEST, pa.string()))  # a scene's key names its picture already
LOOKED_AT = 1_000  # images at most, for one that can be used, before workers start
# counted in the record of a shard of files
HELD_OUT_ROWS = "held out"
FURTHER_ROWS = "further rows of an image"  # of a table: their captions are the image's, too


@dataclass(frozen=True)
class SliceChanges:
    """How many images of a slice are not what they were when the folder was last ingested."""

    added: int = 0
    images: int = 0  # of other bytes
    captions: int = 0  # of the same bytes, with another caption


@dataclass(frozen=True)
class IngestedSlice:
    """What became of a slice."""

    record: DoneRecord
    stood: bool  # the shard: all that was to be made was made before
    seen: SeenSlice
    changes: SliceChanges
    told: tuple[str, ...] = ()  # earlier shards that were of no use


@dataclass
class _File:
    """An image file as it is now."""

    item: FolderItem
    seen: SeenRow
    rows: int = 1  # of a table that it is in

    @property
    def name(self) -> RowName:
        return self.item.key, self.seen.image


@dataclass
class FolderWorker:
    """FolderSlice or TableSlice -> raw tar. An image that cannot be used becomes a failed row with its reason."""

    data: Data
    store_url: str
    folder: str
    captions_needed: bool  # an image without caption is rejected, because no captioner will write one
    looked: int = field(default=0, init=False)
    stored: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.store = open_store(self.store_url)

    @property
    def progress(self) -> int:
        """Rows: each is looked at, then stored."""
        return (self.looked + self.stored) // 2

    def __call__(self, part: FolderSlice | TableSlice, earlier: Sequence[str] = ()) -> IngestedSlice:
        """`earlier`: stems of finished shards that may hold its images, beside those of `part.before`.

        Raises FolderChanged where a file is not as it was listed.
        """
        self.looked = self.stored = 0
        stems = list(dict.fromkeys([*part.before, *earlier]))
        known = [read_seen_rows(self.store, self.folder, stem, part.root) for stem in stems]
        files = self._look(part, known)
        content = sorted((file.item for file in files), key=lambda item: item.key)
        stem = shard_stem(part.number, parts_digest(*(text for item in content for text in item.content())))
        told: tuple[str, ...] = ()
        if stood := self.store.exists(f"{self.folder}/{stem}{DONE}"):
            record = read_shard_done(self.store, self.folder, stem)
            self.stored = len(files)
        else:
            record, told = self._make(part, stem, files, stems)
        write_seen_rows(self.store, self.folder, stem, part.root, (file.seen for file in files))
        at_rest = all(file.seen.is_at_rest for file in files)
        facts = caption_facts((file.item for file in files), self.data)
        seen = SeenSlice(part.seen if at_rest else "", stem.partition(".")[2], part.rows, facts)
        return IngestedSlice(record, stood, seen, _changes(files, known[: len(part.before)]), told)

    def _look(self, part: FolderSlice | TableSlice, known: list[dict[str, SeenRow]]) -> list[_File]:
        """The slice's files as they are now; what is as it was seen is not opened."""
        began, files = time.time_ns(), []
        for image in part.images():
            rows = [seen[image.file.path] for seen in known if image.file.path in seen]
            # Of several the one of the file as it is now: a run that was killed may have seen it later than the last that ended.
            old = max(rows, key=lambda row: (row[:3] == image.file, row.words_key == image.words_key), default=None)
            item = self._item(Path(part.root), image, old)
            files.append(_File(item, _seen_row(image, item, old, began), image.rows))
            self.looked += 1
        return files

    def _item(self, root: Path, image: ListedImage, old: SeenRow | None) -> FolderItem:
        same_file = old is not None and (old.path, old.size, old.mtime_ns) == image.file
        same_words = old is not None and old.words_key == image.words_key
        if same_file and same_words and not image.problem:
            return old.item()
        # What was not read, as a link or what was not there, has no words that hold for the file that is there now.
        has_words = same_words and old.sha256 != ""
        known = {"sha256": old.sha256} if same_file else {"words_of": old.item()} if has_words else {}
        return read_item(root, image, self.data, self.captions_needed, **known)

    def _make(
        self, part: FolderSlice | TableSlice, stem: str, files: list[_File], earlier: list[str]
    ) -> tuple[DoneRecord, tuple[str, ...]]:
        failed: list[FailedRow] = []
        further = sum(file.rows - 1 for file in files)
        counts: Counter[str] = Counter({FURTHER_ROWS: further} if further else {})
        with EarlierRows(self.store, self.folder, earlier) as rows:
            stood = rows.find({file.name for file in files if file.seen.image and not file.item.problem}, row_name)
            samples = self._samples(Path(part.root), files, stood, failed, counts)
            record = write_shard(self.store, self.folder, stem, samples, failed, FILES_SCHEMA, counts=counts)
        return record, tuple(rows.told)

    def _samples(
        self,
        root: Path,
        files: list[_File],
        stood: dict[RowName, EarlierRow],
        failed: list[FailedRow],
        counts: Counter[str],
    ) -> Iterator[Sample]:
        """Samples by key. What is found out of a picture is kept in `files`."""
        for file in sorted(files, key=lambda file: file.item.key):
            item = file.item
            try:
                if reason := item.problem or file.seen.failure:
                    raise DataError(reason)
                if row := stood.get(file.name):
                    found = row.files()
                    extension = next(suffix for suffix in IMAGE_EXTENSIONS if suffix in found)
                    stored, size = found[extension], (row.row["width"], row.row["height"])
                else:
                    picture, extension, stored = usable_image(self.data, root, item)
                    size = picture.image.size
                    file.seen = file.seen._replace(image=short_digest(stored), notes=picture.notes)
                sample = raw_sample(self.data, item.key, extension, stored, size, item.captions, item.name)
                counts.update([*file.seen.notes, *([HELD_OUT_ROWS] if sample.row["split"] == "held_out" else [])])
                yield replace(sample, row=sample.row | {IMAGE_DIGEST: file.seen.image})
            except DataError as error:
                failed.append(FailedRow(key=item.named, reason=str(error)))
                if not item.problem:
                    file.seen = file.seen._replace(failure=str(error))
            self.stored += 1


def _seen_row(image: ListedImage, item: FolderItem, old: SeenRow | None, began: int) -> SeenRow:
    """What is to be remembered of a file that was looked at since `began`, in ns."""

    def is_racy(file: ListedFile) -> bool:
        return item.may_pass or file.mtime_ns >= began - RACY_NS

    row = SeenRow(
        *image.file._replace(mtime_ns=UNKNOWN_TIME if is_racy(image.file) else image.file.mtime_ns),
        "" if any(map(is_racy, image.captions)) else image.words_key,
        item.sha256,
        as_stored(item.captions),
        item.problem,
        item.cut,
        item.lines,
        item.several,
        item.hint,
    )
    if old is None or not item.sha256 or old.sha256 != item.sha256:
        return row
    return row._replace(image=old.image, failure=old.failure, notes=old.notes)


def _changes(files: list[_File], before: list[dict[str, SeenRow]]) -> SliceChanges:
    """`before`: what was seen when the folder was last ingested."""
    rows = {path: row for seen in before for path, row in seen.items()}
    added = images = captions = 0
    for file in files:
        old, item = rows.get(file.item.path), file.item
        if old is None:
            added += 1
        elif old.sha256 != item.sha256:
            images += 1
        else:
            captions += (old.item().captions, bool(old.problem)) != (item.captions, bool(item.problem))
    return SliceChanges(added, images, captions)


def check_usable(
    source: ListedFolder | ListedTable, slices: Sequence[FolderSlice | TableSlice], captions_needed: bool
) -> None:
    """One image that can be used is enough to begin; it is looked for before any worker starts. DataError where none is.

    Among many that are no use the workers look on.
    """
    reasons: Counter[str] = Counter()
    items: list[FolderItem] = []
    for root, image in ((Path(part.root), image) for part in slices for image in part.images()):
        if len(items) == LOOKED_AT:
            return
        items.append(read_item(root, image, source.data, captions_needed))
        try:
            usable_image(source.data, root, items[-1])
            return
        except DataError as error:
            reasons[str(error)] += 1
    notes = source.notes() + source.caption_notes([caption_facts(items, source.data)], captions_needed)
    raise no_usable_image(source.named, reasons, notes)


def no_usable_image(where: str, reasons: dict[str, int], notes: list[str]) -> DataError:
    """`where`: what was to hold one. `reasons`: how many images were rejected for each."""
    most = sorted(reasons.items(), key=lambda reason: -reason[1])[:5]
    why = "; ".join(f"{count} rejected: {reason}" for reason, count in most)
    why = "; ".join([why or "it holds no image file", *notes[:NAMED]])
    return DataError(f"{where}: no usable image ({why}); name another folder, or mend that")


def usable_image(data: Data, root: Path, item: FolderItem) -> tuple[DecodedImage, str, bytes]:
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
        raise FolderChanged(root / item.path)
    return stored_picture(data, item.name, content)


def stored_picture(data: Data, name: str, content: bytes) -> tuple[DecodedImage, str, bytes]:
    """`usable_image` of a file's bytes. `name`: of the file, for messages."""
    with naming(name):
        picture = read_picture(content, PixelRules.of(data))
    if min(picture.image.size) < data.min_side_px:
        raise DataError(f"a side is shorter than {data.min_side_px} px (data.min_side_px)")
    if picture.format in KEPT_FORMATS:
        return picture, KEPT_FORMATS[picture.format], content
    return picture, "png", png_bytes(picture.image)
