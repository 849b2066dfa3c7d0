"""Finds which words belong to which image of a folder.

They stand in a text file beside it, or in a row of a metadata file.

What looks like captions and is not taken is told. Names are only looked up among those that the folder's walk has found, so
no file outside the folder is ever opened. Whoever makes a shard reads its images' words (`read_words`).
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sd3core.data.caption_text import as_stored, from_stored, text_encoding
from sd3core.data.image_files.class_folders import ClassFolders
from sd3core.data.image_names import ImageNames, by_folded, folded
from sd3core.data.metadata_files import METADATA, read_metadata
from sd3core.data.row_fields import PLAIN_FIELDS, RowFields
from sd3core.errors import DataError, UserError
from sd3core.words import NAMED, counted, one_line, some

CAPTION_SUFFIXES = (".txt", ".TXT", ".caption", ".CAPTION")
HOW_TO_GIVE = (
    "NAME.txt, NAME.caption or NAME.jpg.txt beside the image, or file_name and text in a metadata.jsonl, metadata.csv or"
    " metadata.tsv"
)
# What else may hold captions and is not read. It is named where images lack theirs.
UNREAD_SUFFIXES = frozenset(
    [
        ".json",
        ".jsonl",
        ".csv",
        ".tsv",
        ".parquet",
        ".arrow",
        ".xml",
        ".xmp",
        ".yaml",
        ".yml",
        ".md",
        ".text",
        ".tags",
        ".cap",
        ".prompt",
        ".html",
        ".rtf",
        ".doc",
        ".docx",
        ".xls",
        ".xlsx",
        ".zip",
        ".tar",
    ]
)


def is_metadata(name: str) -> bool:
    return name.lower() in METADATA


class ListedFile(NamedTuple):
    """A file of the folder as it was found: path relative to the folder with slashes, bytes, and when it was last written to."""

    path: str
    size: int
    mtime_ns: int


class ListedImage(NamedTuple):
    """An image file, or one thing that was to be one, and what by their names belongs to it."""

    file: ListedFile
    captions: tuple[ListedFile, ...] = ()  # files beside it, in the order in which they count
    texts: tuple[str, ...] = ()  # a metadata file's words, which go before those
    hint: str = ""  # what else may be its caption and is not understood
    problem: str = ""  # why it is not taken
    rows: int = 1  # of a table that it is in

    @property
    def words_key(self) -> str:
        """All that its caption follows from."""
        return json.dumps((self.captions, as_stored(self.texts), self.hint))

    def line(self) -> str:
        """Of an image of a folder."""
        return json.dumps(self._replace(texts=as_stored(self.texts))[:-1])

    @classmethod
    def of_line(cls, line: str) -> ListedImage:
        file, captions, texts, *rest = json.loads(line)
        return cls(ListedFile(*file), tuple(ListedFile(*caption) for caption in captions), from_stored(texts), *rest)


@dataclass(frozen=True)
class FolderFiles:
    """What a walk has found: paths relative to the folder, with slashes."""

    images: list[str]
    captions: dict[str, ListedFile]  # .txt and .caption
    metadata: list[str]
    unread: list[str]  # that may hold captions, and are not read


@dataclass(frozen=True)
class Words:
    """An image's words as they stand, a text for each caption, and what a person should know of how they were found."""

    texts: tuple[str, ...]
    several: tuple[str, ...] = ()  # caption files that fit, where more than one does: the first is taken
    hint: str = ""  # what is there and was not understood, where there are no words


class FolderCaptions:
    """Which captions a folder's images have. The tables are built once; no file is opened but the metadata."""

    def __init__(
        self,
        root: Path,
        spelled: str,
        files: FolderFiles,
        fields: RowFields = PLAIN_FIELDS,
        classes: ClassFolders | None = None,
    ) -> None:
        """`root` is resolved, `spelled` how the recipe names it: metadata may hold either. `fields`: of its rows."""
        self.files, self.classes = files, classes
        self.names = ImageNames((str(root), os.path.abspath(os.path.expanduser(spelled))), files.images)
        self.metadata = read_metadata(root, files.metadata, self.names, fields)
        self._folded = by_folded(files.captions)
        self._unread: dict[str, list[str]] = {}  # by what stands before the suffix
        for file in sorted(files.unread):
            stem, suffix = posixpath.splitext(file)
            if suffix in UNREAD_SUFFIXES:
                self._unread.setdefault(stem, []).append(posixpath.basename(file))

    def of_image(self, file: ListedFile) -> ListedImage:
        """Where an image's words are: the metadata's where they have text, else the files beside it, else its class's."""
        if texts := self.metadata.captions.get(file.path):
            return ListedImage(file, texts=texts)
        files = self.files_of(file.path)
        hint = self._hint(file.path, files)
        if self.classes is not None and not files:
            texts = self.classes.texts_of(file.path)
            return ListedImage(file, texts=texts, hint="" if texts else hint or self.classes.why_none(file.path))
        return ListedImage(file, tuple(self.files.captions[name] for name in files), hint=hint)

    def files_of(self, path: str) -> list[str]:
        """The caption files of an image, in the order in which they count."""
        stem = posixpath.splitext(path)[0]
        found: dict[str, None] = {}
        for name in (stem, path):
            found |= dict.fromkeys(
                file for suffix in CAPTION_SUFFIXES if (file := name + suffix) in self.files.captions
            )
            for suffix in (".txt", ".caption"):
                others = self._folded.get(folded(name + suffix), ())
                if len(others) == 1 and others[0] not in found and self.names.is_only_spelling(stem):
                    found[others[0]] = None
        return list(found)

    def _hint(self, path: str, files: list[str]) -> str:
        """What may be an image's caption beside these files, and is not understood."""
        stem = posixpath.splitext(path)[0]
        unread = [name for stood in (stem, path) for name in self._unread.get(stood, ())]
        differing = [
            posixpath.basename(file)
            for name in dict.fromkeys((stem, path))
            for suffix in (".txt", ".caption")
            for file in self._folded.get(folded(name + suffix), ())
            if file not in files
        ]
        parts = [f"its text is empty in {where}"] if (where := self.metadata.empty.get(path)) else []
        parts += [f"{', '.join(differing)} may mean another image"] if differing else []
        parts += [f"{', '.join(unread)} is not read"] if unread else []
        return "; ".join(parts)

    def has_words(self, path: str) -> bool:
        """Whether a metadata file has an image's words."""
        return path in self.metadata.captions

    def not_taken(self) -> list[str]:
        """A line for each kind of what looks like captions and belongs to no image, where images lack theirs."""
        owned = {file for image in self.files.images for file in self.files_of(image)}
        lost = [file for file in self.files.captions if file not in owned]
        beside = {posixpath.splitext(image)[0] for image in self.files.images} | set(self.files.images)
        unread = [file for file in self.files.unread if posixpath.splitext(file)[0] not in beside]
        lines = []
        if lost:
            shown = [self.names.with_nearest(file, posixpath.splitext(file)[0]) for file in lost[:NAMED]]
            names = some(shown, len(lost))
            lines.append(f"{counted(len(lost), 'caption file')} beside no image of that name: {names}")
        if unread:
            lines.append(
                f"{counted(len(unread), 'file')} that may hold captions not read: {some(unread, len(unread))};"
                f" captions come from {HOW_TO_GIVE}"
            )
        return lines


def read_words(root: Path, image: ListedImage) -> Words:
    """An image's words: the metadata's where they have text, else those of the first file beside it that has any.

    Raises DataError where they cannot be read, OSError as well, FolderChanged where a file is not as it was listed.
    """
    if image.texts:
        return Words(image.texts)
    for file in image.captions:
        text = _read_caption(root, file)
        if one_line(text):
            return Words((text,), tuple(file.path for file in image.captions) if len(image.captions) > 1 else ())
    empty = [f"{posixpath.basename(image.captions[0].path)} is empty"] if image.captions else []
    return Words((), hint="; ".join([*empty, *filter(None, [image.hint])]))


def _read_caption(root: Path, file: ListedFile) -> str:
    path = root / file.path
    if not is_inside(root, path):
        raise DataError("its caption file is a link that leads out of the folder; put the file itself in it")
    if not path.is_file():
        return ""
    try:
        with as_listed(root, file) as opened:
            content = opened.read()
        encoding, skipped = text_encoding(content)
        return content[skipped:].decode(encoding)
    except UnicodeDecodeError:
        raise DataError("its caption file is not UTF-8; save it as UTF-8") from None


class FolderChanged(UserError):
    """A file is not the one that was listed, or has other bytes than were seen though its size and time are the same: a shard
    made from it would bear the wrong name. Not a reject, the shard fails.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} changed since the folder was listed; when it is at rest touch it and run ingest again"
        )


@contextmanager
def as_listed(root: Path, file: ListedFile) -> Iterator[BinaryIO]:
    """The open file. Raises FolderChanged unless it has the listed size and time, before and after it was read."""
    path = root / file.path
    try:
        with path.open("rb") as opened:
            for last in (False, True):
                status = os.fstat(opened.fileno())
                if (status.st_size, status.st_mtime_ns) != file[1:]:
                    raise FolderChanged(path)
                if not last:
                    yield opened
    except FileNotFoundError:
        raise FolderChanged(path) from None


def is_inside(root: Path, path: Path) -> bool:
    """Whether the path is no link out of the folder. (`Path.resolve` would raise for links that lead in a circle.)"""
    return not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(root)
