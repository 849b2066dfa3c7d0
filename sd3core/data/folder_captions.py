"""Finds which words belong to which image of a folder.

They stand in a text file beside it, or in a row of a metadata file.

What looks like captions and is not taken is told. Names are only looked up among those that the folder's walk has found, so
no file outside the folder is ever opened.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path

from sd3core.data.caption_text import text_encoding
from sd3core.data.image_names import ImageNames, by_folded, folded
from sd3core.data.metadata_files import METADATA, read_metadata
from sd3core.errors import DataError
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


def is_caption_file(name: str) -> bool:
    return name.lower().endswith((".txt", ".caption"))


def is_metadata(name: str) -> bool:
    return name.lower() in METADATA


def may_hold_captions(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in UNREAD_SUFFIXES


@dataclass(frozen=True)
class FolderFiles:
    """What a walk has found: paths relative to the folder, with slashes."""

    images: list[str]
    captions: list[str]  # .txt and .caption
    metadata: list[str]
    unread: list[str]  # that may hold captions, and are not read


@dataclass(frozen=True)
class Words:
    """An image's words as they stand, "" for none, and what a person should know of how they were found."""

    text: str
    several: tuple[str, ...] = ()  # caption files that fit, where more than one does: the first is taken
    hint: str = ""  # what is there and was not understood, where there is no text


class FolderCaptions:
    """All captions of a folder. The tables are built once; `words_of` only looks up and opens the image's own files."""

    def __init__(self, root: Path, spelled: str, files: FolderFiles) -> None:
        """`root` is resolved, `spelled` how the recipe names it: metadata may hold either."""
        self.root = root
        self.files = files
        self.names = ImageNames((str(root), os.path.abspath(os.path.expanduser(spelled))), files.images)
        self.metadata = read_metadata(root, files.metadata, self.names)
        self._exact = set(files.captions)
        self._folded = by_folded(files.captions)
        self._unread = set(files.unread)

    def words_of(self, path: str) -> Words:
        """An image's words: the metadata's where they have text, else those of the first file beside it that has any.

        Raises DataError where the image's words cannot be read, OSError as well.
        """
        if text := self.metadata.captions.get(path, ""):
            return Words(text)
        files = self.files_of(path)
        for file in files:
            text = self._read(file)
            if one_line(text):
                return Words(text, tuple(files) if len(files) > 1 else ())
        return Words("", hint=self._hint(path, files))

    def files_of(self, path: str) -> list[str]:
        """The caption files of an image, in the order in which they count."""
        stem = posixpath.splitext(path)[0]
        found: dict[str, None] = {}
        for name in (stem, path):
            found |= dict.fromkeys(file for suffix in CAPTION_SUFFIXES if (file := name + suffix) in self._exact)
            if self.names.is_only_spelling(stem):
                for suffix in (".txt", ".caption"):
                    others = self._folded.get(folded(name + suffix), [])
                    found |= dict.fromkeys(others if len(others) == 1 else ())
        return list(found)

    def _read(self, file: str) -> str:
        if not is_inside(self.root, self.root / file):
            raise DataError("its caption file is a link that leads out of the folder; put the file itself in it")
        if not (self.root / file).is_file():
            return ""
        try:
            content = (self.root / file).read_bytes()
            encoding, skipped = text_encoding(content)
            return content[skipped:].decode(encoding)
        except UnicodeDecodeError:
            raise DataError("its caption file is not UTF-8; save it as UTF-8") from None

    def _hint(self, path: str, files: list[str]) -> str:
        stem = posixpath.splitext(path)[0]
        beside = [name + suffix for name in (stem, path) for suffix in sorted(UNREAD_SUFFIXES)]
        unread = [posixpath.basename(file) for file in beside if file in self._unread]
        differing = [
            posixpath.basename(file)
            for name in dict.fromkeys((stem, path))
            for suffix in (".txt", ".caption")
            for file in self._folded.get(folded(name + suffix), ())
            if file not in files
        ]
        parts = [f"{posixpath.basename(files[0])} is empty"] if files else []
        if where := self.metadata.empty.get(path):
            parts.append(f"its text is empty in {where}")
        parts += [f"{', '.join(differing)} may mean another image"] if differing else []
        parts += [f"{', '.join(unread)} is not read"] if unread else []
        return "; ".join(parts)

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


def is_inside(root: Path, path: Path) -> bool:
    """Whether the path is no link out of the folder. (`Path.resolve` would raise for links that lead in a circle.)"""
    return not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(root)
