"""A folder of images: NAME.jpg with NAME.txt beside it, or a metadata.jsonl with file_name and text in any of its
folders.

Whatever is not taken is an item with a `problem`, so that it is counted and named where the shards are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from sd3core.errors import DataError, with_mend
from sd3core.recipe import Data

READABLE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .ppm".split())
# What else a person calls an image is rejected with a reason, not passed over.
IMAGE_SUFFIXES = READABLE_SUFFIXES | frozenset(".apng .heic .heif .svg .ico .jxl .jp2 .psd .dng .cr2 .nef .arw".split())
CAPTION_SUFFIXES = (".txt", ".TXT")
METADATA = "metadata.jsonl"
NO_CAPTION = "no caption (put it in NAME.txt beside the image, or name a captioner in caption.captioner)"
READ_THREADS = 8


@dataclass(frozen=True)
class FolderItem:
    """One image file, or one thing that was to be one."""

    key: str
    path: str  # relative to the folder
    caption: str
    sha256: str = ""
    problem: str = ""  # why it is not taken
    cut: bool = False  # its caption was longer than data.max_caption_chars

    @property
    def name(self) -> str:
        """The path as text that can be stored, also where the file system's name is not UTF-8."""
        return os.fsencode(self.path).decode("utf-8", "backslashreplace")

    def content(self) -> tuple[str, ...]:
        return self.key, self.sha256, self.caption, self.problem


@dataclass(frozen=True)
class _Metadata:
    """What the metadata.jsonl files say: raw captions by relative path, and the lines that say nothing usable."""

    captions: dict[str, str]
    problems: list[FolderItem]


def list_folder(data: Data, captions_needed: bool) -> list[FolderItem]:
    """Every image of data.folder with its caption and digest, by key. Hidden files are ignored, links out not
    followed.
    """
    root = Path(data.folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"data.folder {data.folder}: no such folder")
    images, metadata_files, problems = _walk(root)
    metadata = _read_metadata(root, metadata_files, set(images))
    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = list(
            threads.map(lambda path: _image_item(root, path, metadata, data.max_caption_chars, captions_needed), images)
        )
    return sorted(problems + metadata.problems + found, key=lambda item: item.key)


def holds_nothing(folder: Path) -> bool:
    """Whether `list_folder` would find neither an image nor a reason to tell why it took none. Opens no file."""
    images, _, problems = _walk(folder.expanduser().resolve())
    return not images and not problems


def image_key(path: str) -> str:
    """A name made from the relative path alone: safe in a tar, without dots, and its own for every path."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.rpartition(".")[0] or path)
    return f"{name[:60]}-{digest}"


def one_line(text: str) -> str:
    """A caption without control characters or line breaks. Any script.

    Characters that show nothing (joiners, marks of direction) stay beside those that do; alone they are no caption.
    """
    kept = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")
    )
    line = " ".join(kept.split())
    return line if any(unicodedata.category(c)[0] in "LMNPS" for c in line) else ""


def cut_at_word(line: str, max_chars: int) -> str:
    """At most so many characters of the line: whole words, where it has spaces."""
    if len(line) <= max_chars:
        return line
    cut = line[:max_chars]
    if line[max_chars] != " " and " " in cut:
        cut = cut[: cut.rindex(" ")]
    return cut.rstrip()


def _walk(root: Path) -> tuple[list[str], list[str], list[FolderItem]]:
    """Relative paths of the image files, of the metadata files, and the links that are not followed."""
    images, metadata, problems = [], [], []
    for folder, folders, names in os.walk(root, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(folder, name).is_symlink():
                problems.append(
                    _problem(Path(folder, name).relative_to(root).as_posix(), "a linked folder is not followed; put the images themselves in it")
                )
        for name in sorted(names):
            path = Path(folder, name)
            is_image = path.suffix.lower() in IMAGE_SUFFIXES
            if name.startswith(".") or not (is_image or name == METADATA):
                continue
            relative = path.relative_to(root).as_posix()
            if not _inside(root, path):
                problems.append(_problem(relative, "a link that leads out of the folder is not followed; put the file itself in it"))
            elif not path.is_file():
                problems.append(_problem(relative, "not a regular file"))
            else:
                (images if is_image else metadata).append(relative)
    return images, metadata, problems


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"data.folder: {error.filename} cannot be listed: {error.strerror}; make it readable, or take it out"
    )


def _inside(root: Path, path: Path) -> bool:
    return not path.is_symlink() or path.resolve().is_relative_to(root)


def _problem(path: str, reason: str) -> FolderItem:
    return FolderItem(image_key(path), path, "", problem=reason)


def _image_item(root: Path, path: str, metadata: _Metadata, max_chars: int, captions_needed: bool) -> FolderItem:
    try:
        with (root / path).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        text = metadata.captions[path] if path in metadata.captions else _text_beside(root, path)
    except OSError as error:
        return _problem(path, f"cannot be read: {with_mend(error)}")
    except DataError as error:
        return _problem(path, str(error))
    line = one_line(text)
    caption = cut_at_word(line, max_chars)
    item = FolderItem(image_key(path), path, caption, sha256, cut=caption != line)
    return replace(item, problem=NO_CAPTION) if captions_needed and not item.caption else item


def _text_beside(root: Path, path: str) -> str:
    image = root / path
    beside = next(filter(Path.is_file, (image.with_suffix(suffix) for suffix in CAPTION_SUFFIXES)), None)
    if beside is None:
        return ""
    if not _inside(root, beside):
        raise DataError("its caption file is a link that leads out of the folder; put the file itself in it")
    try:
        return beside.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError("its caption file is not UTF-8; save it as UTF-8") from None


def _read_metadata(root: Path, files: list[str], images: set[str]) -> _Metadata:
    metadata = _Metadata({}, [])
    for file in files:
        try:
            content = (root / file).read_bytes()
        except OSError as error:
            metadata.problems.append(_problem(file, f"cannot be read: {with_mend(error)}"))
            continue
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if line.strip():
                for reason in _read_line(metadata, Path(file).parent, line, images):
                    metadata.problems.append(_problem(f"{file} line {number}", reason))
    return metadata


def _read_line(metadata: _Metadata, folder: Path, line: bytes, images: set[str]) -> Iterator[str]:
    """Takes one line in, or yields why not."""
    try:
        fields = json.loads(line.decode("utf-8"))
        name, text = fields["file_name"], fields["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        yield "not a JSON object with file_name and text"
        return
    if not isinstance(name, str) or not isinstance(text, str):
        yield "file_name and text must be strings"
        return
    path = os.path.normpath(folder / name)
    if path not in images:
        yield "its file_name is no image of the folder"
    elif path in metadata.captions:
        yield "its file_name stood in an earlier line"
    else:
        metadata.captions[path] = text
