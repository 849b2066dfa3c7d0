"""Deals rows to slices by a hash of their keys: one row more touches one slice.

A slice is all keys whose hash begins with the same bits. One that outgrows a shard splits in two by its next bit, alone, and
two that fit into one again are one. So the slices follow from the keys alone, on any machine and in any order of events.

A slice's number says which it is: 0 is all keys, and slice n splits into 2 n + 1 and 2 n + 2. Numbers have gaps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from sd3core.data.sources.unit_numbers import UNITS_FROM, near_parts

HASH_BITS = 64
LONGEST_PREFIX = 61  # bits; numbers are below those of source files


def slice_hash(key: str) -> int:
    """64 bits that say which slice a key belongs to; independent of the draws that hold rows out and order them."""
    return int.from_bytes(hashlib.sha256(b"slice:" + key.encode()).digest()[:8], "big")


def deal_slices(hashes: np.ndarray, rows: int) -> dict[int, np.ndarray]:
    """Slice number -> positions in `hashes` (n,) uint64, by number. A slice has at most `rows` of them, and at least one."""
    order = np.argsort(hashes, kind="stable")
    return {number: order[start:stop] for number, start, stop in sorted(_slices(hashes[order], rows))}


def _slices(hashes: np.ndarray, rows: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, stop) of each slice of sorted hashes."""
    waiting = [(0, 0, 0, 0, len(hashes))]  # depth, first bits, number, start, stop
    while waiting:
        depth, bits, number, start, stop = waiting.pop()
        if stop - start <= rows or depth == LONGEST_PREFIX:
            if stop > start:
                yield number, start, stop
            continue
        upper = (2 * bits + 1) << (HASH_BITS - depth - 1)
        middle = start + int(np.searchsorted(hashes[start:stop], np.uint64(upper)))
        waiting.append((depth + 1, 2 * bits, 2 * number + 1, start, middle))
        waiting.append((depth + 1, 2 * bits + 1, 2 * number + 2, middle, stop))


def earlier_slices(wanted: Iterable[int], standing: Iterable[int], today: Iterable[int]) -> dict[int, list[int]]:
    """Number of a slice -> those of `standing`, where its rows were before.

    That is the slice itself, or what was put together to it, or the nearest that it was split from: slices that are no more in
    `today`. Numbers that only count have the same number. A source file's rows may also have been in its shards beside that one.
    """
    standing, today = set(standing), set(today)
    gone = {number for number in standing - today if number < UNITS_FROM}
    parts: dict[int, list[int]] = {}
    for number in sorted(gone):
        for above in _above(number):
            parts.setdefault(above, []).append(number)
    return {number: _earlier(number, standing, gone, parts) for number in wanted}


def _earlier(number: int, standing: set[int], gone: set[int], parts: dict[int, list[int]]) -> list[int]:
    if number >= UNITS_FROM:
        return [n for n in (number, *near_parts(number)) if n in standing]
    return [number] if number in standing else parts.get(number) or [n for n in _above(number) if n in gone][:1]


def _above(number: int) -> Iterator[int]:
    while number:
        number = (number - 1) // 2
        yield number
