"""Lists a folder's files by name, size and time, and opens none of them."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sd3core.data.folder_captions import (
    CAPTION_SUFFIXES,
    UNREAD_SUFFIXES,
    FolderFiles,
    ListedFile,
    is_inside,
    is_metadata,
)
from sd3core.data.image_files.sidecars import (
    CountedNames,
    beside_images,
    is_of_tools,
    lies_in_tools_folder,
    sidecar_note,
)
from sd3core.errors import DataError

READABLE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"]
)
# What else a person calls an image is rejected with a reason, not passed over.
IMAGE_SUFFIXES = READABLE_SUFFIXES | frozenset(
    [".apng", ".heic", ".heif", ".svg", ".ico", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".nef", ".arw"]
)
WORDS_SUFFIXES = frozenset([".txt", ".caption"])
LISTED_SUFFIXES = IMAGE_SUFFIXES | WORDS_SUFFIXES | UNREAD_SUFFIXES
LINK_OUT = "a link that leads out of the folder is not followed; put the file itself in it"
LINKED_FOLDER = "a linked folder is not followed; put the images themselves in it"
# A file written to so shortly before it was looked at may be written to again without another time: git's "racily clean".
RACY_NS = 2_000_000_000


class ListedProblem(NamedTuple):
    """What was to be an image, or a folder of them, and is not taken."""

    path: str
    reason: str


@dataclass
class _Names:
    """The files of one folder that matter, by name."""

    prefix: str  # of the folder's files: "", or its path with a slash
    joined: str  # names, with zeros between them: a third of the memory of a list
    sizes: array
    times: array  # when they were last written to, ns
    odd: dict[str, str] = field(default_factory=dict)  # links that lead out and what is no file: why it is not taken
    hidden: CountedNames = field(default_factory=CountedNames)  # images, and folders of tools

    def listed(self, suffixes: frozenset[str]) -> Iterator[ListedFile]:
        names = self.joined.split("\0") if self.sizes else ()
        for name, size, written in zip(names, self.sizes, self.times, strict=True):
            if _suffix(name) in suffixes and name not in self.odd:
                yield ListedFile(self.prefix + name, size, written)


@dataclass
class FolderListing:
    """What a walk has found; `digest` is another one where any name, size or time is."""

    root: Path
    folders: list[_Names]
    linked: list[str]  # folders
    digest: str
    at_rest: bool  # no file was written to so shortly before that it may be written to again unseen
    takes_sidecars: bool = False

    def images(self) -> Iterator[ListedFile]:
        """All but what lies in folders of tools."""
        for folder in self._folders():
            yield from folder.listed(IMAGE_SUFFIXES)

    def images_taken(self, has_words: Callable[[str], bool]) -> Iterator[ListedFile]:
        """The images without masks and thumbnails. `has_words`: of a path, whether a metadata file has its words."""
        for folder in self._folders():
            beside = self._beside(folder, has_words)
            yield from (file for file in folder.listed(IMAGE_SUFFIXES) if file.path not in beside)

    def sidecar_note(self, has_words: Callable[[str], bool]) -> list[str]:
        """A line on what is not taken for an image, where there is such."""
        in_folders, beside, hidden = CountedNames(), CountedNames(), CountedNames()
        for folder in self.folders:
            hidden += folder.hidden
            if not self.takes_sidecars and lies_in_tools_folder(folder.prefix):
                in_folders += CountedNames.of(file.path for file in folder.listed(IMAGE_SUFFIXES))
            else:
                beside += CountedNames.of(sorted(self._beside(folder, has_words)))
        return sidecar_note(in_folders, beside, hidden)

    def _folders(self) -> Iterator[_Names]:
        return (f for f in self.folders if self.takes_sidecars or not lies_in_tools_folder(f.prefix))

    def _beside(self, folder: _Names, has_words: Callable[[str], bool]) -> set[str]:
        """The masks and thumbnails of a folder, by path."""
        if self.takes_sidecars:
            return set()
        words = cache(lambda: {file.path for file in folder.listed(WORDS_SUFFIXES)})

        def has_caption(image: str) -> bool:
            names = {posixpath.splitext(image)[0], image}
            return has_words(image) or any(name + suffix in words() for name in names for suffix in CAPTION_SUFFIXES)

        return beside_images([file.path for file in folder.listed(IMAGE_SUFFIXES)], has_caption)

    def problems(self) -> Iterator[ListedProblem]:
        yield from (ListedProblem(path, LINKED_FOLDER) for path in self.linked)
        for folder in self._folders():
            odd = ((name, why) for name, why in folder.odd.items() if _suffix(name) in IMAGE_SUFFIXES)
            yield from (ListedProblem(folder.prefix + name, why) for name, why in odd)

    def notes(self) -> list[str]:
        """Of metadata that is not read."""
        return [
            f"{folder.prefix}{name}: {why}"
            for folder in self.folders
            for name, why in folder.odd.items()
            if is_metadata(name) and why == LINK_OUT
        ]

    def files(self) -> FolderFiles:
        """Everything by its kind, for captions to be found."""
        files = FolderFiles([image.path for image in self.images()], {}, [], [])
        for folder in self._folders():
            files.captions.update((file.path, file) for file in folder.listed(WORDS_SUFFIXES))
            for file in folder.listed(UNREAD_SUFFIXES):
                (files.metadata if is_metadata(file.path.rpartition("/")[2]) else files.unread).append(file.path)
        return files


def list_folder(folder: str, *, takes_sidecars: bool = False) -> FolderListing:
    """Hidden files are ignored, and links out not followed. Raises DataError where there is no such folder.

    What else tools leave (`sd3core.data.image_files.sidecars`) is listed, and is no image unless the listing `takes_sidecars`.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise DataError(f"data.folder {folder}: no such folder")
    began, hasher = time.time_ns(), hashlib.sha256()
    folders: list[_Names] = []
    linked: list[str] = []
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        names, inner, links = _read_folder(root, prefix)
        waiting += [f"{prefix}{name}/" for name in sorted(inner, reverse=True)]
        linked += [prefix + name for name in sorted(links)]
        hasher.update(json.dumps([prefix, names.joined, names.odd, sorted(links)]).encode() + b"\0")
        hasher.update(names.sizes.tobytes() + names.times.tobytes())
        if names.sizes or names.hidden.count:
            folders.append(names)
    newest = max((max(names.times) for names in folders if names.times), default=0)
    return FolderListing(root, folders, linked, hasher.hexdigest(), newest < began - RACY_NS, takes_sidecars)


def holds_nothing(folder: Path) -> bool:
    """Whether it has neither an image nor a reason to tell why none was taken."""
    listing = list_folder(str(folder))
    return next(listing.images(), None) is None and next(listing.problems(), None) is None


def _read_folder(root: Path, prefix: str) -> tuple[_Names, list[str], list[str]]:
    """The files of one folder, and the names of its folders and of its links to folders."""
    names: list[str] = []
    sizes, times = array("q"), array("q")
    odd: dict[str, str] = {}
    hidden: list[str] = []
    inner: list[str] = []
    links: list[str] = []
    try:
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    if _suffix(name) in IMAGE_SUFFIXES or is_of_tools(name):
                        hidden.append(prefix + name)
                    continue
                is_link = entry.is_symlink()
                if _is_folder(entry):
                    (links if is_link else inner).append(name)
                elif _suffix(name) in LISTED_SUFFIXES:
                    size, written = 0, 0
                    if why := _why_not(root, entry) if is_link or not entry.is_file(follow_symlinks=False) else "":
                        odd[name] = why
                    else:
                        size, written = _size_and_time(entry)
                    names.append(name)
                    sizes.append(size)
                    times.append(written)
    except OSError as error:
        if lies_in_tools_folder(prefix):  # as lost+found, which is root's
            return _Names(prefix, "", array("q"), array("q")), [], []
        raise DataError(
            f"data.folder: {error.filename} cannot be listed: {error.strerror}; make it readable, or take it out"
        ) from None
    order = sorted(range(len(names)), key=names.__getitem__)
    by_name = _Names(
        prefix,
        "\0".join(names[i] for i in order),
        array("q", [sizes[i] for i in order]),
        array("q", [times[i] for i in order]),
        dict(sorted(odd.items())),
        CountedNames.of(sorted(hidden)),
    )
    return by_name, inner, links


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle
        return False


def _why_not(root: Path, entry: os.DirEntry) -> str:
    """Why a link, or what is no file, is not taken; "" where it is, or where whoever reads it looks."""
    if _suffix(entry.name) not in IMAGE_SUFFIXES and not is_metadata(entry.name):
        return ""
    if not is_inside(root, Path(entry.path)):
        return LINK_OUT
    return "" if os.path.isfile(entry.path) else "not a regular file"


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # gone meanwhile, or a link to nothing: whoever opens it says so
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _suffix(name: str) -> str:
    return name[name.rfind(".") :].lower()
