"""Finds the image that a name means, also where it is spelled otherwise.

Other case, other accents, backslashes, percent signs, an absolute path of this or another machine: taken where exactly one image
fits. All lookups are in tables that are built once, when they are first needed.
"""

from __future__ import annotations

import bisect
import difflib
import posixpath
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NamedTuple
from urllib.parse import unquote

DRIVE = re.compile(r"[A-Za-z]:/")
NEAR = 500  # names before and after, among which the nearest one is looked for
TAILS = 32  # parts of an absolute path that are looked at


def folded(path: str) -> str:
    """The path without what file systems and programs differ in: case, and how accents are composed."""
    if path.isascii():
        return path.lower()  # the same, without a million normalisations
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Found(NamedTuple):
    """The images that a name may mean: none, the one it means, or several."""

    images: list[str]
    exact: bool = False  # spelled as the file is
    by_file_name_only: bool = (
        False  # an absolute path of which no folder was found here: another's 0001.jpg has that end too
    )


class ImageNames:
    """Finds the image that a name means, among the folder's own, however it is spelled."""

    def __init__(self, roots: Iterable[str], images: list[str]) -> None:
        self.roots = tuple(dict.fromkeys(roots))
        self.images = images

    @cached_property
    def _exact(self) -> set[str]:
        return set(self.images)

    @cached_property
    def _folded(self) -> dict[str, list[str]]:
        return by_folded(self.images)

    @cached_property
    def _stems(self) -> dict[str, str]:
        """By what they are without case and accents; "" of several."""
        stems: dict[str, str] = {}
        for image in self.images:
            stem = posixpath.splitext(image)[0]
            if stems.setdefault(folded(stem), stem) != stem:
                stems[folded(stem)] = ""
        return stems

    def is_only_spelling(self, stem: str) -> bool:
        """Whether no other image's name differs from this one in case or accents alone."""
        return self._stems[folded(stem)] == stem

    def find(self, folder: str, name: str) -> Found:
        """The images that a name in the folder's metadata may mean."""
        plain = posixpath.normpath(posixpath.join(folder, name))
        if plain in self._exact:
            return Found([plain], exact=True)
        spellings = _spellings(name)
        paths = [path for s in spellings for base in (folder, "") for path in self._from_root(base, s)]
        found = [path for path in paths if path in self._exact]
        found = found or [image for path in paths for image in self._folded.get(folded(path), ())]
        if found:
            return Found(list(dict.fromkeys(found)))
        parts_that_fit: dict[str, int] = {}
        for tail in (tail for s in spellings for tail in _tails_elsewhere(s)):
            for path in (posixpath.normpath(posixpath.join(base, tail)) for base in (folder, "")):
                for image in self._folded.get(folded(path), ()):
                    parts_that_fit.setdefault(image, tail.count("/") + 1)
        return Found(list(parts_that_fit), by_file_name_only=set(parts_that_fit.values()) == {1})

    def with_nearest(self, said: str, name: str) -> str:
        """What is `said`, and the image whose name is most like `name` where one is."""
        nearest = self._nearest(_folded_stem(_spellings(name)[-1]))
        return f"{said} (nearest: {nearest})" if nearest else said

    def _nearest(self, name: str) -> str:
        place = bisect.bisect_left(self._by_stem, (name, ""))
        near = dict(reversed(self._by_stem[max(0, place - NEAR) : place + NEAR]))
        like = difflib.get_close_matches(name, near, n=1)
        return near[like[0]] if like else ""

    @cached_property
    def _by_stem(self) -> list[tuple[str, str]]:
        return sorted((_folded_stem(image), image) for image in self.images)

    def _from_root(self, base: str, name: str) -> Iterator[str]:
        for root in self.roots:
            path = posixpath.normpath(posixpath.join(root, base, name))
            if path.startswith(root.rstrip("/") + "/"):
                yield path[len(root.rstrip("/")) + 1 :]


def by_folded(paths: Iterable[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        table[folded(path)].append(path)
    return table


def _folded_stem(path: str) -> str:
    return folded(posixpath.splitext(posixpath.basename(path))[0])


def _spellings(name: str) -> list[str]:
    """The ways in which other programs write one path, as a path with slashes."""
    plain = name.strip()
    plain = plain[7:] if plain.lower().startswith("file://") else plain
    spelled = [plain, plain.replace("\\", "/")]
    return list(dict.fromkeys(spelled + [unquote(s) for s in spelled]))


def _tails_elsewhere(path: str) -> list[str]:
    """The ends of an absolute path, which may be of another machine, the longest first."""
    if not (path.startswith("/") or DRIVE.match(path)):
        return []
    parts = posixpath.normpath(path).strip("/").split("/")[-TAILS:]
    return ["/".join(parts[i:]) for i in range(len(parts))]
