"""Reads `data.urls`: files, folders and brace patterns, here or in a bucket.

Every entry is a base, which is listed, and what is taken below it. The first base's files are named by their paths below it, so
a data set that moves to another bucket keeps its names; those of another base have, before that, as much of the base's end as no
base before it has. So names follow from the list of URLs alone, whatever files come or go, and an entry that is added at the
end renames nothing.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sd3core.errors import DataError
from sd3core.files.local_paths import FILE_URL, expanded, path_of_url

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MOST_NAMES = 1_000_000  # that one pattern may stand for
S3_URL = "s3://"


@dataclass(frozen=True)
class UrlEntry:
    """One of `data.urls`. `paths`: below the base, where the entry names files; None for all below it."""

    spelled: str
    base: str  # a whole path, or s3://bucket/prefix
    label: str  # goes before the names of its files; "" of the first base
    paths: tuple[str, ...] | None
    is_pattern: bool = False


def read_urls(urls: Sequence[str], suffix: str) -> list[UrlEntry]:
    """`suffix`: of the files that are wanted, as ".tar"; an entry without braces that ends so is one file."""
    labels: dict[str, str] = {}
    entries = []
    for spelled in urls:
        place = spelled.rstrip("/") if spelled.startswith(S3_URL) else _whole_path(spelled)
        if "*" in place or "?" in place:
            raise DataError(
                f"data.urls {spelled}: * and ? are no pattern here; name the folder, or write {{0000..0123}}"
            )
        base, paths = _base_and_paths(spelled, place, suffix)
        labels.setdefault(base, _label(base, labels))
        entries.append(UrlEntry(spelled, base, labels[base], paths, "{" in place))
    return entries


def _whole_path(spelled: str) -> str:
    path = path_of_url(spelled) if spelled.startswith(f"{FILE_URL}/") else expanded(spelled)
    return os.path.abspath(path)


def _base_and_paths(spelled: str, place: str, suffix: str) -> tuple[str, tuple[str, ...] | None]:
    """What is listed, and which files below it are meant."""
    if "{" not in place:
        if not place.lower().endswith(suffix):
            return place, None
        base, _, name = place.rpartition("/")
        if base in ("s3:/", ""):
            raise DataError(f"data.urls {spelled}: it names no file of a folder or bucket; write it whole")
        return base, (name,)
    base = place[: place.index("{")].rpartition("/")[0]
    if base in ("s3:/", ""):
        raise DataError(
            f"data.urls {spelled}: a bucket's name takes no braces, nor a folder's right below /; name each by itself"
        )
    return base, tuple(expand_braces(place[len(base) + 1 :], spelled))


def expand_braces(pattern: str, spelled: str) -> list[str]:
    """a{00..02} -> a00, a01, a02; a{x,y} -> ax, ay; several pairs of braces in all combinations."""
    parts = BRACES.split(pattern)
    if any("{" in text or "}" in text for text in parts[::2]):
        raise DataError(
            f"data.urls {spelled}: braces that do not close, or stand in others; write {{0000..0123}} or {{a,b}}"
        )
    choices = [list(_choices(inside, spelled)) for inside in parts[1::2]]
    if (count := _product(map(len, choices))) > MOST_NAMES:
        raise DataError(f"data.urls {spelled}: {count:,} names, more than {MOST_NAMES:,}; name the folder instead")
    return [
        "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], chosen, fillvalue="")))
        for chosen in itertools.product(*choices)
    ]


def _choices(inside: str, spelled: str) -> Iterator[str]:
    if numbers := NUMBER_RANGE.fullmatch(inside):
        first, last = numbers.groups()
        if int(first) > int(last) or int(last) - int(first) >= MOST_NAMES:
            raise DataError(
                f"data.urls {spelled}: {{{inside}}} counts from a smaller number to a larger, of a million names"
            )
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        yield from (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    elif "," in inside:
        yield from inside.split(",")
    else:
        raise DataError(f"data.urls {spelled}: {{{inside}}} is neither {{0000..0123}} nor {{a,b}}")


def _product(sizes: Iterator[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _label(base: str, labels: dict[str, str]) -> str:
    """As many of the base's last parts as no label before it is."""
    if not labels:
        return ""
    parts = [part for part in base.removeprefix(S3_URL).split("/") if part]
    for count in range(1, len(parts) + 1):
        if (label := "/".join(parts[-count:])) not in labels.values():
            return label
    return base
