"""Listing of tars and parquet files: names, numbers, and what 100,000 of them cost the driver."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter

import pytest

from sd3core.data.shards import shard_number, shard_stem
from sd3core.data.slices import earlier_slices
from sd3core.data.sources import listing as listing_module
from sd3core.data.sources import unit_numbers
from sd3core.data.sources.listing import SourceListing, list_source
from sd3core.data.sources.seen_units import SeenUnit, read_seen_source, write_seen_source
from sd3core.data.sources.unit_numbers import PARTS, UNITS_FROM, near_parts, number_units
from sd3core.data.sources.urls import expand_braces, read_urls
from sd3core.data.store import StoreEntry, open_store
from sd3core.recipe import Data

TARS = 100_000


class ListedBucket:
    """A bucket that can be listed and nothing else; a request gives a thousand objects, as S3's does."""

    def __init__(self, objects: list[StoreEntry]) -> None:
        self.objects = objects
        self.asked: Counter[str] = Counter()

    def list(self, prefix: str = "") -> list[StoreEntry]:
        self.asked["pages"] += -(-len(self.objects) // 1000)
        return self.objects


def of_urls(*urls: str, source: str = "webdataset") -> Data:
    return Data(name="x", source=source, urls=urls)


def listed(monkeypatch, objects: list[StoreEntry], *urls: str) -> tuple[SourceListing, ListedBucket]:
    bucket = ListedBucket(objects)
    monkeypatch.setattr(listing_module, "open_store", lambda base: bucket)
    return list_source(of_urls(*urls)), bucket


def entries(names: list[str]) -> list[StoreEntry]:
    return [StoreEntry(name, 500_000_000, 1.0, f'"{number:032x}"') for number, name in enumerate(names)]


def test_100_000_tars_cost_seconds_and_a_listing(monkeypatch, tmp_path):
    """With img2dataset's two files beside each. One tar more numbers no other anew, and what stands is known without a request a
    tar.
    """
    names = [f"{n:05d}{suffix}" for n in range(TARS) for suffix in (".parquet", ".tar", "_stats.json")]
    objects = entries(names)
    started = time.process_time()
    before, bucket = listed(monkeypatch, objects, "s3://b/laion")
    # 2.7 s where nothing else runs
    assert time.process_time() - started < 30
    assert len(before.units) == TARS and bucket.asked == {"pages": 300}

    more, _ = listed(monkeypatch, [*objects, *entries(["x00000.tar", "x00000_stats.json"])], "s3://b/laion")
    numbers = {unit.name: unit.number for unit in more.units}
    assert {unit.name: unit.number for unit in before.units}.items() < numbers.items()
    assert [unit.number for unit in more.units] == sorted(numbers.values())

    store = open_store(str(tmp_path))
    units = {unit.number: SeenUnit(unit.version, ("0123456789ab",) * 2, 1000, {}) for unit in before.units}
    started = time.process_time()
    write_seen_source(store, "datasets/x", units)
    seen = read_seen_source(store, "datasets/x")
    assert seen == units
    (record,) = store.list("datasets/x")
    assert time.process_time() - started < 30 and record.size < 6e6


def test_a_tar_takes_less_than_a_kilobyte_of_the_driver(monkeypatch):
    objects = entries([f"{n:05d}{suffix}" for n in range(5_000) for suffix in (".parquet", ".tar", "_stats.json")])
    tracemalloc.start()
    try:
        found, _ = listed(monkeypatch, objects, "s3://b/laion")
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.units) == 5_000 and held < 5_000 * 1_000 and most < 5_000 * 2_000, (held, most)


def test_a_pattern_of_100_000_names_is_one_listing(monkeypatch):
    names = [f"{n:05d}.tar" for n in range(TARS)]
    found, bucket = listed(monkeypatch, entries(names), f"s3://b/laion/{{00000..{TARS - 1}}}.tar")
    assert len(found.units) == TARS and bucket.asked == {"pages": 100} and not any(u.problem for u in found.units)


def test_a_file_that_two_urls_pass_over_is_told_once(monkeypatch):
    names = ["a/00000.tar", "a/00001.tar", "a/00001_stats.json", "a/00002_incomplete.tar"]
    found, _ = listed(monkeypatch, entries(names), "s3://b", "s3://b/{a,x}/00000.tar", "s3://b")
    told = sorted(
        note.rpartition(": ")[2] for note in found.notes if note.startswith("1 file of data.urls passed over")
    )
    assert told == ["a/00000.tar", "a/00002_incomplete.tar"] and len(found.notes) == 2


def test_numbers_are_apart_fit_64_bits_and_leave_room_for_parts():
    names = [f"{n:06d}.tar" for n in range(TARS)]
    numbers = number_units(names)
    assert len({*numbers.values()}) == TARS and all(UNITS_FROM <= n < 2**63 for n in numbers.values())
    assert all(number % PARTS == 0 for number in numbers.values())
    some = number_units(names[::7])
    assert some.items() <= numbers.items()
    assert shard_number(shard_stem(max(numbers.values()) + PARTS - 1, "0" * 12)) == max(numbers.values()) + PARTS - 1


def test_two_names_of_one_hash_have_two_numbers(monkeypatch):
    """Whatever order they come in."""
    monkeypatch.setattr(unit_numbers, "NAME_BITS", 8)
    names = [f"{n}.tar" for n in range(200)]
    numbers = number_units(names)
    assert len({*numbers.values()}) == 200 and numbers == number_units(names[::-1])


def test_rows_of_a_file_are_looked_for_in_its_own_shards_alone():
    first = number_units(["a"])["a"]
    assert near_parts(first) == [first + 1] and near_parts(first + 3) == [first + 2, first + 4] and near_parts(7) == []
    assert near_parts(first + PARTS - 1) == [first + PARTS - 2]
    standing = {first, first + 1, first + 2, first + PARTS}
    assert earlier_slices([first + 1], standing, standing) == {first + 1: [first + 1, first, first + 2]}
    assert earlier_slices([first + 3], standing, standing) == {first + 3: [first + 2]}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{,.old}.tar", ["x.tar", "x.old.tar"]),
    ],
)
def test_braces(pattern, names):
    assert expand_braces(pattern, pattern) == names


@pytest.mark.parametrize("folder", ["/data", "/mnt", "file:///data", "s3://b"])
def test_braces_may_stand_right_below_a_folder_of_the_root_or_a_bucket(folder):
    (entry,) = read_urls([f"{folder}/{{00..01}}.tar"], ".tar")
    assert (entry.base, entry.paths) == (folder.removeprefix("file://"), ("00.tar", "01.tar"))


def test_labels_follow_from_the_urls_alone():
    def labels(*urls: str) -> list[str]:
        return [entry.label for entry in read_urls(urls, ".tar")]

    assert labels("s3://b/x/", "/data/cc12m", "s3://b/x/{0..1}.tar", "/other/cc12m", "s3://c/other/cc12m") == [
        "", "cc12m", "", "other/cc12m", "c/other/cc12m",
    ]  # fmt: skip
    assert labels("s3://b/x/", "/data/cc12m") == labels("/moved/y", "/data/cc12m")
