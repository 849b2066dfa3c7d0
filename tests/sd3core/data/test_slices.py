"""Slices follow from the keys alone, and a key more or less touches one of them, also among a hundred thousand."""

from __future__ import annotations

import numpy as np
import pytest

from sd3core.data.slices import deal_slices, earlier_slices, slice_hash

RNG = np.random.default_rng(0)


def hashes(count: int) -> np.ndarray:
    return RNG.integers(0, 2**64, count, dtype=np.uint64)


def dealt(keys: np.ndarray, rows: int) -> dict[int, frozenset[int]]:
    """Number of a slice -> its hashes."""
    return {number: frozenset(keys[places].tolist()) for number, places in deal_slices(keys, rows).items()}


def changed(before: dict[int, frozenset[int]], after: dict[int, frozenset[int]]) -> tuple[set[int], set[int]]:
    """Numbers of slices that are gone or hold something else, and of those that are new or do."""
    return (
        {number for number in before if after.get(number) != before[number]},
        {number for number in after if before.get(number) != after[number]},
    )


def test_golden_slices():
    """Where this changes on purpose, raise specs.SLICES: every shard of a folder is another one then."""
    keys = [f"image-{number}" for number in range(12)]
    assert slice_hash("image-0") == 5572494692336802865
    found = deal_slices(np.array([slice_hash(key) for key in keys], dtype=np.uint64), 4)
    assert {number: places.tolist() for number, places in found.items()} == {
        3: [3, 9, 8, 6],
        4: [0, 4, 1],
        5: [11],
        6: [5, 10, 7, 2],
    }


@pytest.mark.parametrize("count, rows", [(0, 4), (1, 4), (4, 4), (5, 4), (1_000, 1), (20_000, 64), (20_000, 30_000)])
def test_every_key_is_in_one_slice_and_no_slice_is_empty_or_too_large(count, rows):
    keys = hashes(count)
    found = deal_slices(keys, rows)
    assert sorted(np.concatenate([*found.values(), np.zeros(0, int)]).tolist()) == list(range(count))
    assert all(0 < len(places) <= rows for places in found.values()) and list(found) == sorted(found)
    for number, places in found.items():  # all begin with the bits that its number says
        depth = (number + 1).bit_length() - 1
        bits = number + 1 - (1 << depth)
        assert {int(key) >> (64 - depth) for key in keys[places]} == {bits} if depth else number == 0
    shuffled = RNG.permutation(keys)
    assert dealt(shuffled, rows) == dealt(keys, rows)


def test_keys_of_one_hash_stay_together():
    keys = np.full(9, 2**63 + 5, dtype=np.uint64)
    ((number, places),) = deal_slices(keys, 4).items()
    assert len(places) == 9 and number < 2**63


def test_one_key_more_or_less_touches_one_slice_and_splits_it_alone():
    """All along the way from nothing to a thousand keys, and back."""
    keys = hashes(1_000)
    slices = [dealt(keys[:count], 8) for count in range(len(keys) + 1)]
    splits = 0
    for count in range(1, len(keys) + 1):
        before, after = slices[count - 1], slices[count]
        gone, new = changed(before, after)
        rows_before = frozenset().union(*(before[number] for number in gone))
        rows_after = frozenset().union(*(after[number] for number in new))
        assert len(gone) <= 1 and rows_after - rows_before == {int(keys[count - 1])} and rows_before <= rows_after
        splits += len(new) > 1
        for there, back in ((before, after), (after, before)):  # grows, shrinks
            earlier = earlier_slices(back, there, back)
            for number in changed(there, back)[1]:
                known = frozenset().union(frozenset(), *(there[n] for n in earlier[number]))
                assert back[number] - known <= {int(keys[count - 1])}
    assert splits > 100


def test_numbers_that_count_have_themselves_before_them():
    """The small world's: a shard more at the end has none."""
    assert earlier_slices([2, 3, 4], standing=range(3), today=range(5)) == {2: [2], 3: [], 4: []}
    assert earlier_slices([0], standing=range(3), today=[0]) == {0: [0]}


@pytest.mark.parametrize("change", ["one more", "one less", "one renamed", "one of other bytes", "a tenth more"])
def test_of_a_hundred_thousand_shards_only_new_rows_are_made(change):
    """Planned over hashes, no file opened: which slices change, and which of their rows no earlier one holds."""
    rows, count = 8, 570_000
    keys = hashes(count)
    added = {"one more": 1, "one renamed": 1, "a tenth more": count // 10}.get(change, 0)
    before = deal_slices(keys, rows)
    assert 95_000 < len(before) < 125_000
    kept = keys[1:] if change in ("one less", "one renamed") else keys
    after_keys = np.concatenate([kept, hashes(added)])
    after = deal_slices(after_keys, rows)
    held = {number: set(keys[places].tolist()) for number, places in before.items()}
    touched = [n for n, places in after.items() if held.get(n) != set(after_keys[places].tolist())]
    other_bytes = {int(keys[5])} if change == "one of other bytes" else set()
    touched += [n for n, places in after.items() if other_bytes & set(after_keys[places].tolist())]
    earlier = earlier_slices(touched, before, after)
    made = 0
    for number in touched:
        known = set().union(*(held[n] for n in earlier[number])) - other_bytes
        made += len(set(after_keys[after[number]].tolist()) - known)
    assert made == added + len(other_bytes)
    if change != "a tenth more":  # a rename touches two, and each may split or be put together with its other half
        assert len(touched) <= {"one renamed": 3}.get(change, 2)
