"""Takes a folder's images with their captions, and says why one is not taken.

Captions are NAME.txt beside NAME.jpg, or rows of a metadata file in any of its folders.

What is not taken is an item with a `problem`, so that it is counted and named where the shards are made. What is odd about the
captions is told in a line for each kind.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sd3core.data.caption_text import clean_captions, mixes_languages
from sd3core.data.folder_captions import (
    HOW_TO_GIVE,
    FolderCaptions,
    ListedFile,
    ListedImage,
    as_listed,
    read_words,
)
from sd3core.data.folder_listing import FolderListing
from sd3core.data.image_files.class_folders import OUTSIDE, UNNAMED
from sd3core.data.slices import deal_slices, slice_hash
from sd3core.errors import DataError, UserError, is_of_the_machine, with_mend
from sd3core.recipe import Data
from sd3core.words import NAMED, counted, some

NO_CAPTION_IN_ROW = "no caption in its row (data.caption_fields; or name a captioner in caption.captioner)"
NO_CAPTION = (
    f"no caption (give it as {HOW_TO_GIVE}; for a folder a class set data.class_caption; or name a captioner in"
    " caption.captioner)"
)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class FolderItem:
    """One image file, or one thing that was to be one."""

    key: str
    path: str  # relative to the folder
    captions: tuple[str, ...]
    sha256: str = ""
    problem: str = ""  # why it is not taken
    cut: bool = False  # a caption was longer than data.max_caption_chars
    lines: int = 1  # of its caption file that were made one, the most of any
    several: tuple[str, ...] = ()  # caption files that fit it, where the first of more than one was taken
    hint: str = ""  # what may be its caption and was not understood
    may_pass: bool = False  # the problem: it is of the right to read, not of the bytes

    @property
    def name(self) -> str:
        """The path as text that can be stored, also where the file system's name is not UTF-8."""
        return storable(self.path)

    @property
    def named(self) -> str:
        """The name, and what was not understood of its caption."""
        return f"{self.name} ({storable(self.hint)})" if self.hint else self.name

    def content(self) -> tuple[str, ...]:
        """What names it in a shard's digest. Of a problem that there is one, not its words: to say it better remakes nothing."""
        one = self.key, self.sha256, "".join(self.captions[:1]), "left out" if self.problem else ""
        return (*one, json.dumps(self.captions)) if len(self.captions) > 1 else one


@dataclass(frozen=True)
class FolderSlice:
    """The files of one shard, as they were listed."""

    number: int
    root: str
    lines: tuple[str, ...]  # ListedImage.line of each
    before: tuple[str, ...] = ()  # stems of the shards that its files were in when the folder was last ingested

    @property
    def rows(self) -> int:
        return len(self.lines)

    @property
    def seen(self) -> str:
        """Another digest where any name, size or time is."""
        return hashlib.sha256("\n".join(self.lines).encode()).hexdigest()[:32]

    def images(self) -> Iterator[ListedImage]:
        return map(ListedImage.of_line, self.lines)


def deal_folder(listing: FolderListing, captions: FolderCaptions, rows: int) -> list[FolderSlice]:
    """A folder's images by slices of at most `rows`, by the slices' numbers."""
    lines: list[str] = []
    hashes = array("Q")
    for file in listing.images_taken(captions.has_words):
        lines.append(captions.of_image(file).line())
        hashes.append(slice_hash(image_key(file.path)))
    for path, reason in listing.problems():
        lines.append(ListedImage(ListedFile(path, 0, 0), problem=reason).line())
        hashes.append(slice_hash(image_key(path)))
    dealt = deal_slices(np.array(hashes, dtype=np.uint64), rows)
    return [
        FolderSlice(number, str(listing.root), tuple(lines[i] for i in sorted(places.tolist())))
        for number, places in dealt.items()
    ]


def image_key(path: str) -> str:
    """A name made from the relative path alone: safe in a tar, without dots, and its own for every path."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.rpartition(".")[0] or path)
    return f"{name[:60]}-{digest}"


def read_item(
    root: Path,
    image: ListedImage,
    data: Data,
    captions_needed: bool,
    sha256: str = "",
    words_of: FolderItem | None = None,
) -> FolderItem:
    """Reads an image's bytes for their digest unless `sha256` is given, and its words unless they are those of `words_of`, which was read.

    Raises FolderChanged for a file that is not as it was listed, UserError for what says nothing of the file.
    """
    path = image.file.path
    if image.problem:
        return FolderItem(image_key(path), path, (), problem=image.problem)
    try:
        if not sha256:
            with as_listed(root, image.file) as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        if words_of is not None:
            return replace(words_of, sha256=sha256)
        words = read_words(root, image)
    except OSError as error:
        if is_of_the_machine(error):  # says nothing of the file, and would leave it out
            raise UserError(f"data.{data.source}: {root / path}: {with_mend(error)}") from None
        return FolderItem(image_key(path), path, (), problem=f"cannot be read: {with_mend(error)}", may_pass=True)
    except DataError as error:
        return FolderItem(image_key(path), path, (), problem=str(error))
    captions, cut, lines = clean_captions(words.texts, data)
    lacking = NO_CAPTION_IN_ROW if data.source == "table" else NO_CAPTION
    lacking = words.hint if words.hint in (OUTSIDE, UNNAMED) else lacking
    problem = lacking if captions_needed and not captions else ""
    return FolderItem(
        image_key(path),
        path,
        captions,
        sha256,
        problem=problem,
        cut=cut,
        lines=lines,
        several=words.several,
        hint=words.hint if words.hint != problem else "",
    )


CUT, LONG, MIXED, SEVERAL, WITHOUT, HINTED, MOST_LINES = "cut", "long", "mixed", "several", "without", "hinted", "lines"


def caption_facts(items: Iterable[FolderItem], data: Data) -> dict[str, Any]:
    """What is to be told of captions: for each kind how many, and the first names; and the most lines of one."""
    found: dict[str, list[str]] = {}
    most = 0
    for item in items:
        if item.cut:
            found.setdefault(CUT, []).append(item.path)
        if item.lines > 1 and data.caption == "whole":
            found.setdefault(LONG, []).append(item.path)
            most = max(most, item.lines)
        if any(map(mixes_languages, item.captions)):
            found.setdefault(MIXED, []).append(item.path)
        if item.several:
            found.setdefault(SEVERAL, []).append(f"{item.path} ({', '.join(item.several)})")
        if item.sha256 and not item.captions:
            found.setdefault(WITHOUT, []).append(item.path)
            if item.hint:
                found.setdefault(HINTED, []).append(f"{item.path} ({item.hint})")
    facts: dict[str, Any] = {kind: [len(names), sorted(names)[:NAMED]] for kind, names in found.items()}
    return facts | ({MOST_LINES: most} if most else {})


def caption_notes(
    data: Data,
    facts: Iterable[dict[str, Any]],
    images: int,
    not_taken: Callable[[], list[str]],
    noted: bool,
    captions_needed: bool,
) -> list[str]:
    """What a person should know before hours are spent on captions that were read otherwise than they were meant.

    `facts` of all slices, `images` found in them. `not_taken` says what looks like captions and belongs to no image, `noted` that
    something was told of captions before.
    """
    counts: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    most = 0
    for of_one in facts:
        most = max(most, of_one.get(MOST_LINES, 0))
        for kind in of_one.keys() - {MOST_LINES}:
            counts[kind] = counts.get(kind, 0) + of_one[kind][0]
            names[kind] = sorted([*names.get(kind, ()), *of_one[kind][1]])[:NAMED]

    def told(kind: str) -> str:
        return some(names[kind], counts[kind])

    notes = []
    if CUT in counts:
        limit = f"{data.max_caption_chars:,} characters (data.max_caption_chars)"
        notes.append(f"{counted(counts[CUT], 'caption')} cut at {limit}: {told(CUT)}")
    if LONG in counts:
        notes.append(
            f"{counted(counts[LONG], 'caption')} of several lines (up to {most}), which are joined: is it one caption?"
            f" data.caption=first_line takes the first line alone: {told(LONG)}"
        )
    if MIXED in counts:
        notes.append(
            f"{counted(counts[MIXED], 'caption')} in three scripts or more, as one text in several languages has: is it one"
            f" caption? data.caption=first_line takes the first line alone, else keep one language: {told(MIXED)}"
        )
    if SEVERAL in counts:
        notes.append(
            f"{counted(counts[SEVERAL], 'image')} with more than one caption file, the first that has words is taken:"
            f" {told(SEVERAL)}"
        )
    if WITHOUT not in counts:
        return notes
    notes += not_taken()
    if HINTED in counts:
        notes.append(f"{counted(counts[HINTED], 'image')} whose captions were not understood: {told(HINTED)}")
    had_captions = counts[WITHOUT] < images or notes or noted
    if not captions_needed and had_captions:
        notes.append(
            f"{counted(counts[WITHOUT], 'image')} without a caption that was understood: the captioner's alone will describe"
            f" them; stop here and mend that if they should have their own: {told(WITHOUT)}"
        )
    return notes


def storable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
