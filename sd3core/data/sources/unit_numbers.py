"""Numbers the shards of source files by a hash of the files' names.

So a file that comes or goes renumbers no other. A file's shards are numbered on from its own number, the first of PARTS. All these numbers are 2**62 or more: those of slices and
of drawn worlds are far below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

UNITS_FROM = 1 << 62
PART_BITS = 14
PARTS = 1 << PART_BITS  # shards that one file may become
NAME_BITS = 48
NEAR_PARTS = 1  # how far a row of a file may have moved, in shards, when rows before it came or went


def number_units(names: Iterable[str]) -> dict[str, int]:
    """Each name's number. Of two names with one hash, which 100,000 have once in 50,000 times, the later takes another."""
    numbers: dict[str, int] = {}
    taken: set[int] = set()
    for name in sorted(names):
        attempt = 0
        while (number := _number(name, attempt)) in taken:
            attempt += 1
        taken.add(number)
        numbers[name] = number
    return numbers


def near_parts(number: int) -> list[int]:
    """The shards of the same file beside a shard; none of what is no source file's."""
    if number < UNITS_FROM:
        return []
    beside = (number + step for far in range(1, NEAR_PARTS + 1) for step in (-far, far))
    return [other for other in beside if other >> PART_BITS == number >> PART_BITS]


def _number(name: str, attempt: int) -> int:
    text = f"unit:{attempt}:{name}".encode("utf-8", "surrogateescape")
    bits = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> (64 - NAME_BITS)
    return UNITS_FROM + (bits << PART_BITS)
