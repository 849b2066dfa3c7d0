"""Images are counted by bucket from what ingest wrote of them, each raw shard once."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sd3core.buckets import bucket_side, buckets_for_area, nearest_bucket
from sd3core.data import raw_buckets
from sd3core.data.ingest import RAW_SCHEMA
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.raw_buckets import (
    RawBuckets,
    after_merging,
    count_raw_buckets,
    look_at_raw_buckets,
    merges_of,
    merging_note,
    too_small_note,
)
from sd3core.data.shards import Sample, read_shard_index, write_shard
from sd3core.data.size_rule import SizeRule
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.specs import INDEX

SIDES = tuple(buckets_for_area(256, 16, max_ratio=2.0))
SIZES = [(400 + 31 * n, 700 - 23 * n) for n in range(20)] + [(512, 512)] * 20


def write(store, number: int) -> ShardEntry:
    samples = [
        Sample(
            f"{number}-{n:03d}",
            {"jpg": b"x"},
            {"width": w + number, "height": h, "caption": "", "source": "", "split": split},
        )
        for n, (w, h) in enumerate(SIZES)
        for split in ["held_out" if n % 5 == 0 else "train"]
    ]
    record = write_shard(store, "raw", f"{number:05d}.0123456789ab", samples, [], RAW_SCHEMA)
    return ShardEntry(
        number=number,
        stem=record.stem,
        rows=record.rows,
        bytes=record.bytes,
        digest=record.digest,
        index_digest=record.files[INDEX],
    )


def manifest(shards: list[ShardEntry]) -> Manifest:
    return Manifest(stage="raw", spec="0", fields={}, inputs={}, folder="raw", shards=shards)


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def counted(store, raw: Manifest, count=count_raw_buckets, **how) -> dict[int, dict[tuple[int, int], list[int]]]:
    """Shard -> bucket -> [rows to train on, held-out ones], where there are any."""
    (found,) = count(store, raw, [SizeRule(SIDES)], **how)
    return {
        number: {side: both for side, both in zip(SIDES, rows.tolist(), strict=True) if any(both)}
        for number, rows in zip(found.numbers, found.rows, strict=True)
    }


def test_each_raw_shard_is_counted_once(store):
    shards = [write(store, number) for number in range(3)]
    counts = counted(store, manifest(shards[:2]))
    for number in range(2):
        wanted = Counter((nearest_bucket(w + number, h, SIDES), n % 5 == 0) for n, (w, h) in enumerate(SIZES))
        assert {
            (side, split) for side, found in counts[number].items() for split in (False, True) if found[split]
        } == set(wanted)
        assert all(counts[number][side][held_out] == rows for (side, held_out), rows in wanted.items())
    for shard in shards[:2]:
        store.delete(f"raw/{shard.stem}{INDEX}")  # what is counted is not read again
    assert counted(store, manifest(shards[:2])) == counts
    grown = counted(store, manifest(shards))
    assert grown.keys() == {0, 1, 2} and {number: grown[number] for number in counts} == counts
    with pytest.raises(DataError, match="its index is gone; delete its done record and run ingest again"):
        count_raw_buckets(store, manifest(shards), [SizeRule(SIDES[:2])])  # other buckets are counted anew


def test_what_a_rule_leaves_out_is_in_no_bucket(store):
    """As the rule says it of one image, for scales at which sides lie just on the bound."""
    raw = manifest([write(store, 0)])
    for scale in (0.25, 1.0, 1.7 / 2, 400 / 432):
        rule = SizeRule(SIDES, scale)
        (rows,) = count_raw_buckets(store, raw, [rule])
        wanted = Counter(nearest_bucket(*size, SIDES) for size in SIZES if rule.takes(*size))
        assert {
            side: int(found.sum()) for side, found in zip(SIDES, rows.rows[0], strict=True) if found.any()
        } == wanted
        assert int(rows.too_small.sum()) == sum(not rule.takes(*size) for size in SIZES)
        again = SizeRule.of_dict({"other": 1} | rule.to_dict())
        assert again == rule and len(rule.taken_of(read_shard_index(store, "raw", raw.shards[0].stem))) == sum(
            wanted.values()
        )
    exact, wide = SizeRule(((512, 512), (352, 704)), 1.0), SizeRule(((512, 512), (352, 704)))
    assert exact.takes(512, 512) and not exact.takes(511, 512) and exact.takes(704, 352) and not exact.takes(800, 351)
    assert wide.takes(1, 1) and SizeRule.of_dict({}) is None


def test_a_record_that_is_damaged_is_made_again(store):
    raw = manifest([write(store, 0)])
    counts = counted(store, raw)
    (record,) = [entry.path for entry in store.list("raw/") if "BUCKETS" in entry.path]
    whole = store.get(record)
    for damaged in (b"no json", whole.replace(b"[", b"[1", 1), b"[]"):
        store.put(record, damaged)
        assert counted(store, raw) == counts
        assert store.get(record) == whole


def test_a_look_writes_nothing_and_reads_no_more_than_it_may(store):
    raw = manifest([write(store, number) for number in range(3)])
    before = [entry.path for entry in store.list("raw/")]
    assert look_at_raw_buckets(store, raw, [SizeRule(SIDES)], at_most=2) is None
    counts = counted(store, raw, look_at_raw_buckets, at_most=3)
    assert [entry.path for entry in store.list("raw/")] == before
    assert counted(store, raw) == counts == counted(store, raw, look_at_raw_buckets, at_most=0)


def test_an_index_is_read_once_for_all_lists_and_a_kill_costs_a_part(store, monkeypatch):
    raw, read, shown = manifest([write(store, number) for number in range(7)]), [], []
    whole = raw_buckets.read_shard_index

    def reading(store, folder, stem, digest):
        read.append(stem)
        if len(read) == 6:
            raise KeyboardInterrupt
        return whole(store, folder, stem, digest)

    monkeypatch.setattr(raw_buckets, "read_shard_index", reading)
    monkeypatch.setattr(raw_buckets, "SHARDS_A_RECORD", 2)
    monkeypatch.setattr(raw_buckets, "SHARDS_SHOWN", 1)
    lists = [SizeRule(SIDES), SizeRule(SIDES[:2]), SizeRule(SIDES)]
    with pytest.raises(KeyboardInterrupt):
        count_raw_buckets(store, raw, lists)
    first, second, again = count_raw_buckets(store, raw, lists, shown.append)
    assert len(read) == 6 + 7 - 4 and [progress.done for progress in shown] == [5, 6, 7]
    assert shown[-1].total == 7 and shown[-1].unit == "shards"
    assert (first.rows == again.rows).all() and first.rows.sum() == second.rows.sum() == 7 * len(SIZES)
    read.clear()
    count_raw_buckets(store, raw, lists)
    assert not read


def test_what_is_merged_and_what_there_is_then():
    square, wide, tall = (256, 256), (240, 256), (352, 176)
    rows = RawBuckets(
        (square, wide, tall),
        (3, 5),
        np.array([[[6, 1], [2, 1], [0, 0]], [[4, 0], [1, 0], [1, 0]]], dtype=np.int32),
        np.array([[0, 0], [3, 1]], dtype=np.int32),
    )
    assert rows.left_out() == {5: 4}
    assert too_small_note(rows, 0.5) == (
        "4 of 20 images left out, 1 of them held out: they do not fill their bucket (min_scale 0.5; a smaller one enlarges them)"
    )
    assert rows.shards_with(wide) == {3, 5} and rows.shards_with(tall) == {5}
    merged = merges_of(rows, 8)
    assert merged == {wide: square}
    assert merging_note(rows, merged, 8) == (
        "3 images of sizes with fewer images than a batch of 8 cropped to the nearest size that has more, at most 6.2% more of each"
        " cut off (240x256 to 256x256 px)"
    )
    counts = after_merging(rows, merged)
    assert {bucket_side(name): rows for name, rows in zip(counts.buckets, counts.rows[0].tolist(), strict=True)} == {
        square: 13,
        tall: 1,
    }
    assert merging_note(rows, {}, 8) is None
