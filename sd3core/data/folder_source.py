"""Lists a folder of images with their captions.

Captions are NAME.txt beside NAME.jpg, or rows of a metadata file in any of its folders.

What is not taken is an item with a `problem`, so that it is counted and named where the shards are made. What is odd about the
captions is told in a line for each kind.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd3core.data.caption_text import lines_of, mixes_languages
from sd3core.data.folder_captions import (
    HOW_TO_GIVE,
    FolderCaptions,
    FolderFiles,
    is_caption_file,
    is_inside,
    is_metadata,
    may_hold_captions,
)
from sd3core.data.records import sha256_of
from sd3core.errors import DataError, is_of_the_machine, with_mend
from sd3core.recipe import Data
from sd3core.words import counted, cut_at_word, one_line, some

READABLE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"]
)
# What else a person calls an image is rejected with a reason, not passed over.
IMAGE_SUFFIXES = READABLE_SUFFIXES | frozenset(
    [".apng", ".heic", ".heif", ".svg", ".ico", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".nef", ".arw"]
)
NO_CAPTION = f"no caption (give it as {HOW_TO_GIVE}; or name a captioner in caption.captioner)"
LINK_OUT = "a link that leads out of the folder is not followed; put the file itself in it"
FOLDER_THREADS = 8
Tell = Callable[[str], None]


@dataclass(frozen=True)
class FolderItem:
    """One image file, or one thing that was to be one."""

    key: str
    path: str  # relative to the folder
    caption: str
    sha256: str = ""
    problem: str = ""  # why it is not taken
    cut: bool = False  # its caption was longer than data.max_caption_chars
    lines: int = 1  # of its caption file that were made one
    several: tuple[str, ...] = ()  # caption files that fit it, where the first of more than one was taken
    hint: str = ""  # what may be its caption and was not understood

    @property
    def name(self) -> str:
        """The path as text that can be stored, also where the file system's name is not UTF-8."""
        return _storable(self.path)

    @property
    def named(self) -> str:
        """The name, and what was not understood of its caption."""
        return f"{self.name} ({_storable(self.hint)})" if self.hint else self.name

    def content(self) -> tuple[str, ...]:
        """What names it in a shard's digest. Of a problem that there is one, not its words: to say it better remakes nothing."""
        return self.key, self.sha256, self.caption, "left out" if self.problem else ""


def list_folder(data: Data, captions_needed: bool, tell: Tell = lambda note: None) -> list[FolderItem]:
    """Every image of data.folder with its caption and digest, by key. Hidden files are ignored, links out not
    followed. What a person should know of the captions goes to `tell`, a line for each kind.
    """
    root = Path(data.folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"data.folder {data.folder}: no such folder")
    walked = _walk(root)
    captions = FolderCaptions(root, data.folder, walked.files)
    with ThreadPoolExecutor(FOLDER_THREADS) as threads:
        found = list(
            threads.map(lambda path: _image_item(root, path, captions, data, captions_needed), walked.files.images)
        )
    for note in [*walked.notes, *captions.metadata.notes, *_caption_notes(data, found, captions, captions_needed)]:
        tell(_storable(note))
    return sorted(walked.problems + found, key=lambda item: item.key)


def holds_nothing(folder: Path) -> bool:
    """Whether `list_folder` would find neither an image nor a reason to tell why it took none. Opens no file."""
    walked = _walk(folder.expanduser().resolve())
    return not walked.files.images and not walked.problems


def image_key(path: str) -> str:
    """A name made from the relative path alone: safe in a tar, without dots, and its own for every path."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:10]
    name = re.sub(r"[^A-Za-z0-9_-]", "_", path.rpartition(".")[0] or path)
    return f"{name[:60]}-{digest}"


@dataclass(frozen=True)
class _Walked:
    files: FolderFiles = field(default_factory=lambda: FolderFiles([], [], [], []))
    problems: list[FolderItem] = field(default_factory=list)  # images, and folders, that are not taken
    notes: list[str] = field(default_factory=list)


def _walk(root: Path) -> _Walked:
    """Every file that matters, and the links that are not followed."""
    walked = _Walked()
    for folder, folders, names in os.walk(root, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if Path(folder, name).is_symlink():
                walked.problems.append(
                    _problem(
                        Path(folder, name).relative_to(root).as_posix(),
                        "a linked folder is not followed; put the images themselves in it",
                    )
                )
        for name in sorted(names):
            if not name.startswith("."):
                _sort_in(walked, root, Path(folder, name))
    return walked


def _sort_in(walked: _Walked, root: Path, path: Path) -> None:
    """Puts a file where it belongs, by its name. Caption files that are links are looked at where they are read."""
    relative, files = path.relative_to(root).as_posix(), walked.files
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if not is_inside(root, path):
            walked.problems.append(_problem(relative, LINK_OUT))
        elif not path.is_file():
            walked.problems.append(_problem(relative, "not a regular file"))
        else:
            files.images.append(relative)
    elif is_metadata(path.name):
        if not is_inside(root, path):
            walked.notes.append(f"{relative}: {LINK_OUT}")
        elif path.is_file():
            files.metadata.append(relative)
    elif is_caption_file(path.name):
        files.captions.append(relative)
    elif may_hold_captions(path.name):
        files.unread.append(relative)


def _cannot_list(error: OSError) -> None:
    raise DataError(
        f"data.folder: {error.filename} cannot be listed: {error.strerror}; make it readable, or take it out"
    )


def _problem(path: str, reason: str) -> FolderItem:
    return FolderItem(image_key(path), path, "", problem=reason)


def _image_item(root: Path, path: str, captions: FolderCaptions, data: Data, captions_needed: bool) -> FolderItem:
    try:
        sha256 = sha256_of(root / path)
        words = captions.words_of(path)
    except OSError as error:
        if is_of_the_machine(error):  # says nothing of the file, and would leave it out
            raise DataError(f"data.folder: {root / path}: {with_mend(error)}") from None
        return _problem(path, f"cannot be read: {with_mend(error)}")
    except DataError as error:
        return _problem(path, str(error))
    lines = lines_of(words.text)
    line = "".join(lines[:1]) if data.caption == "first_line" else one_line(words.text)
    caption = cut_at_word(line, data.max_caption_chars)
    item = FolderItem(
        image_key(path),
        path,
        caption,
        sha256,
        cut=caption != line,
        lines=len(lines),
        several=words.several,
        hint=words.hint,
    )
    return replace(item, problem=NO_CAPTION) if captions_needed and not item.caption else item


def _caption_notes(data: Data, items: list[FolderItem], captions: FolderCaptions, captions_needed: bool) -> list[str]:
    """What a person should know before hours are spent on captions that were read otherwise than they were meant."""
    notes = []
    if cut := [item.path for item in items if item.cut]:
        limit = f"{data.max_caption_chars:,} characters (data.max_caption_chars)"
        notes.append(f"{counted(len(cut), 'caption')} cut at {limit}: {some(cut, len(cut))}")
    long = [item for item in items if item.lines > 1 and data.caption == "whole"]
    if long:
        most = max(item.lines for item in long)
        notes.append(
            f"{counted(len(long), 'caption')} of several lines (up to {most}), which are joined: is it one caption?"
            f" data.caption=first_line takes the first line alone: {some([item.path for item in long], len(long))}"
        )
    if mixed := [item.path for item in items if mixes_languages(item.caption)]:
        notes.append(
            f"{counted(len(mixed), 'caption')} in three scripts or more, as one text in several languages has: is it one"
            f" caption? data.caption=first_line takes the first line alone, else keep one language: {some(mixed, len(mixed))}"
        )
    if several := [f"{item.path} ({', '.join(item.several)})" for item in items if item.several]:
        notes.append(
            f"{counted(len(several), 'image')} with more than one caption file, the first that has words is taken:"
            f" {some(several, len(several))}"
        )
    without = [item for item in items if item.sha256 and not item.caption]
    if not without:
        return notes
    notes += captions.not_taken()
    hinted = [f"{item.path} ({item.hint})" for item in without if item.hint]
    if hinted:
        notes.append(f"{counted(len(hinted), 'image')} whose captions were not understood: {some(hinted, len(hinted))}")
    had_captions = len(without) < len(items) or notes or captions.metadata.notes
    if not captions_needed and had_captions:
        names = some([item.path for item in without], len(without))
        notes.append(
            f"{counted(len(without), 'image')} without a caption that was understood: the captioner's alone will describe"
            f" them; stop here and mend that if they should have their own: {names}"
        )
    return notes


def _storable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
