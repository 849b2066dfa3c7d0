"""Near-duplicates against a walk over all pairs, and what finding them holds and reads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sd3core.errors import StoreError
from sd3core.filters import near_duplicates
from sd3core.filters.duplicate_lists import Duplicate
from sd3core.filters.near_duplicates import DuplicateSearch, FeatureRows, find_duplicates, state_bytes
from sd3core.filters.picture_hash import HASH_BYTES, mirror_blind, picture_hash

SEARCH = DuplicateSearch(threshold=0.9, mirrored=False, rows_per_cluster=10**6, most_clusters=16_000, seed=0)


class Rows:
    """Shards of rows whose keys are in no order, a third of them held out."""

    def __init__(self, features: np.ndarray, shard_rows: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.features, self.shard_rows, count = features, shard_rows, len(features)
        self.keys = [f"k{number:06d}" for number in rng.permutation(count)]
        self.held_out = rng.random(count) < 1 / 3
        self.reads: Counter[int] = Counter()
        self.threads: set[int] = set()
        self.seconds = 0.0  # that a read takes

    @property
    def shards(self) -> list[tuple[int, int]]:
        starts = range(0, len(self.features), self.shard_rows)
        return [(7 * place, min(self.shard_rows, len(self.features) - start)) for place, start in enumerate(starts)]

    def read(self, shard: int) -> FeatureRows:
        self.reads[shard] += 1
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        part = slice(shard // 7 * self.shard_rows, (shard // 7 + 1) * self.shard_rows)
        return FeatureRows(shard, pa.array(self.keys[part]), self.held_out[part], self.features[part])

    def walk(self, threshold: float) -> list[Duplicate]:
        """The paper's algorithm over all pairs, row by row."""
        unit = self.features / np.linalg.norm(self.features.astype(np.float32), axis=1, keepdims=True)
        order = sorted(range(len(unit)), key=lambda row: (self.held_out[row], self.keys[row]))
        gone: dict[int, int] = {}
        for place, row in enumerate(order):
            if row not in gone:
                for other in order[place + 1 :]:
                    if unit[row] @ unit[other] >= threshold:
                        gone.setdefault(other, row)
        shard = lambda row: 7 * (row // self.shard_rows)
        leaked = lambda row, of: bool(self.held_out[row] and not self.held_out[of])
        return [
            Duplicate(shard(row), self.keys[row], self.keys[of], shard(of), leaked(row, of)) for row, of in gone.items()
        ]


def groups(count: int, centres: int, width: int, noise: float, seed: int = 1) -> np.ndarray:
    """Features around random centres: chains of likes within a group."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(centres, width))
    return (centre[rng.integers(centres, size=count)] + noise * rng.normal(size=(count, width))).astype(np.float16)


def search_rows(
    rows: Rows, search: DuplicateSearch = SEARCH, shards=None, tell=lambda rows, doing: None
) -> list[Duplicate]:
    found = find_duplicates(rows.read, rows.shards if shards is None else shards, search, tell)
    return [Duplicate(**row) for row in found.to_pylist()]


def in_order(found) -> list[Duplicate]:
    return sorted(found, key=lambda duplicate: duplicate.key)


@pytest.mark.parametrize("block", [4, 1_024])
@pytest.mark.parametrize("noise", [0.05, 0.3, 0.45])
def test_within_one_cluster_it_is_the_walk_over_all_pairs(monkeypatch, block, noise):
    monkeypatch.setattr(near_duplicates, "BLOCK_ROWS", block)
    monkeypatch.setattr(near_duplicates, "COLUMNS_AT_ONCE", 7)
    rows = Rows(groups(150, 40, 16, noise), 32)
    found = in_order(search_rows(rows))
    assert found == in_order(rows.walk(0.9)) and 20 < len(found) < 150
    assert any(duplicate.leaked for duplicate in found)


def test_over_borders_of_clusters_hardly_any_is_lost_and_what_goes_is_like_what_stays():
    rows = Rows(groups(3_000, 2_000, 16, 0.03), 200)
    found = search_rows(rows, replace(SEARCH, rows_per_cluster=64))
    wanted = {duplicate.key for duplicate in rows.walk(0.9)}
    gone = {duplicate.key for duplicate in found}
    assert gone <= wanted and len(gone) >= 0.99 * len(wanted)
    assert not gone & {duplicate.of for duplicate in found} and len(gone) == len(found)


def test_the_order_of_shards_changes_nothing():
    rows = Rows(groups(300, 100, 16, 0.2), 50)
    found = in_order(search_rows(rows))
    assert in_order(search_rows(rows, shards=rows.shards[::-1])) == found


def test_a_million_of_the_same_picture_hold_no_pairs():
    """All but one go, by the comparisons of one row with all others: blocks compare only what they keep."""
    rows = Rows(np.ones((20_000, 8), dtype=np.int8), 4_000)
    found = search_rows(rows)
    assert len(found) == 19_999 and len({duplicate.of for duplicate in found}) == 1


def test_rows_are_read_once_and_memory_holds_a_small_part_of_them(monkeypatch):
    """As of 100 million rows: 256 partitions, read once each, of which the largest has a few times the average."""
    held: list[int] = []
    likes = near_duplicates._likes

    def watched(path, *rest):
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            held.append(reader.read_all().num_rows)
        yield from likes(path, *rest)

    monkeypatch.setattr(near_duplicates, "_likes", watched)
    monkeypatch.setattr(near_duplicates, "POINTS_A_CENTROID", 8)
    monkeypatch.setattr(near_duplicates, "BUFFERED_ROWS", 2_000)
    rng = np.random.default_rng(0)
    rows, said = Rows(rng.integers(-90, 90, (24_000, 16), dtype=np.int8), 200), []
    rows.seconds = 0.02
    search_rows(rows, replace(SEARCH, rows_per_cluster=80), tell=lambda rows, doing: said.append(rows))
    assert sum(held) == 2 * 24_000 and len(held) == 256 and max(held) < 8 * sum(held) / len(held)
    seen_twice = sum(count - 1 for count in rows.reads.values())
    assert len(rows.threads) >= near_duplicates.READING_AT_ONCE  # a request does not wait for the one before
    assert max(rows.reads.values()) == 2 and seen_twice <= 1 + 120 * 300 * 8 / 24_000  # k-means' own share
    assert said == sorted(said) and said[-1] <= 2 * 24_000
    assert state_bytes(HASH_BYTES) == 2 * (114 + 57)


def test_a_full_disk_is_said_in_one_line(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(near_duplicates, "_write_partitions", full)
    rows = Rows(groups(10, 5, 8, 0.1), 5)
    with pytest.raises(StoreError, match=r"^temporary folder .* \(TMPDIR\): No space left on device$"):
        search_rows(rows)


def test_nothing_to_compare():
    rows = Rows(groups(1, 1, 8, 0.1), 5)
    assert search_rows(rows, shards=[]) == search_rows(rows) == []


def test_the_hash_of_a_mirrored_picture_has_other_signs_alone_and_its_bytes_stay():
    """Golden: other bytes would have every image hashed again, and need another HASH_VERSION."""
    y, x = np.mgrid[0:48, 0:64]
    image = Image.fromarray(np.stack([4 * x, 5 * y, (x * y) % 256], axis=2).astype(np.uint8))
    own, mirrored = picture_hash(image), picture_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert own.dtype == np.int8 and own.shape == (HASH_BYTES,) == (114,)
    assert np.abs(mirror_blind(own).astype(int) - mirror_blind(mirrored)).max() <= 1 and (own != mirrored).sum() > 10
    turned = own * near_duplicates.MIRROR_SIGNS
    assert np.abs(turned.astype(int) - mirrored).max() <= 1
    np.testing.assert_allclose(own[:8], GOLDEN, atol=1)  # the last bit of a cosine may round otherwise elsewhere


def test_black_pictures_are_alike_and_so_are_all_of_one_grey():
    pictures = [
        Image.new("RGB", size, colour)
        for size, colour in (((64, 64), "black"), ((32, 48), "black"), ((64, 64), "white"))
    ]
    hashes = np.stack([picture_hash(picture) for picture in [*pictures, Image.new("RGB", (64, 64), "red")]])
    found = search_rows(Rows(hashes, 2), replace(SEARCH, threshold=0.985, mirrored=True))
    assert len(found) == 2 and np.abs(hashes).max() <= 127


GOLDEN = [81, -30, -4, -9, -4, -6, -3, -5]
