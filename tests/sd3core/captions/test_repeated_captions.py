"""Captions on too many images: what is found, when it is exact, what it costs with 100,000 shards, and what a kill leaves."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from sd3core.captions import repeated
from sd3core.captions.repeated import (
    HASHES,
    NONE_REPEATED,
    REPEATED_AT_LEAST,
    caption_hash,
    caption_index,
    find_repeated,
    read_repeated,
    sample_bound,
)
from sd3core.data.manifest import Manifest, ManifestRef, ShardEntry, commit_manifest
from sd3core.data.shards import FailedRow, read_shard_done, sample_id, shard_stem, write_table
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.specs import DONE, INDEX

FOLDER = "datasets/x/captions/0"


def write_captions(store, shards: list[list[str]], bound: int = HASHES, first: int = 0) -> list[ShardEntry]:
    entries = []
    for number, captions in enumerate(shards, start=first):
        rows = [(f"k{number}-{i}", caption) for i, caption in enumerate(captions)]
        table = pa.table({"key": [key for key, _ in rows], "caption": [caption for _, caption in rows]})
        stem = shard_stem(number, "0" * 12)
        entries.append(ShardEntry.of(write_table(store, FOLDER, stem, table, [], caption_index(rows, bound))))
    return entries


def commit(store, entries: list[ShardEntry]) -> ManifestRef:
    manifest = Manifest(stage="captions", spec="0", fields={}, inputs={}, folder=FOLDER, shards=entries)
    return commit_manifest(store, FOLDER, manifest)


def captions_of(shards: int, rows: int, often: dict[str, int]) -> list[list[str]]:
    """Shards in which caption `often` stands so many times in all, one shard after the other, and all others once."""
    flat = [f"caption {i}" for i in range(shards * rows)]
    for place, (caption, count) in enumerate(often.items()):
        for i in range(count):
            flat[(i * rows + place) % len(flat) + (i * rows) // len(flat)] = caption
    return [flat[start : start + rows] for start in range(0, len(flat), rows)]


def test_a_caption_that_is_rare_in_every_shard_is_found_over_all(tmp_path):
    """Once or twice in each of 100 shards of 50: 2 % of a shard, and 1.2 % of all."""
    store = open_store(str(tmp_path))
    often = {"a photo": 60, "a picture": 50, "an image": 25, "a drawing": 12}
    ref = commit(store, write_captions(store, captions_of(100, 50, often)))
    found = find_repeated(store, ref, 0.005)
    assert [(one.text, one.images) for one in found.captions.values()] == [("a photo", 60), ("a picture", 50)]
    assert (found.images, found.sampled, found.share) == (5_000, 1.0, 110 / 5_000)
    assert list(find_repeated(store, ref, 0.0049).captions) == list(
        map(caption_hash, ("a photo", "a picture", "an image"))
    )
    # an image or two are a small data set's share, and say nothing
    assert len(find_repeated(store, ref, 0.0001).captions) == 3 and REPEATED_AT_LEAST == 20
    assert find_repeated(store, ref, 1.0) is NONE_REPEATED
    assert find_repeated(store, ref, 0.5).digest == "" != found.digest


def test_images_without_a_caption_are_images(tmp_path):
    store = open_store(str(tmp_path))
    ref = commit(store, write_captions(store, [["a photo"] * 50 + [""] * 50]))
    assert find_repeated(store, ref, 0.5).captions == {}, "half of them is not more than half"
    assert find_repeated(store, ref, 0.49).captions[caption_hash("a photo")].images == 50


def test_what_was_found_is_read_and_not_counted_again(tmp_path, monkeypatch):
    store = open_store(str(tmp_path))
    ref = commit(store, write_captions(store, [["a photo"] * 30 + ["a cat"]]))
    assert read_repeated(store, ref, 0.1) is None
    found = find_repeated(store, ref, 0.1)
    [path] = [entry.path for entry in store.list(FOLDER) if "REPEATED" in entry.path]
    with monkeypatch.context() as patch:
        patch.setattr(repeated, "read_shard_index", None)  # nobody calls it
        assert find_repeated(store, ref, 0.1) == read_repeated(store, ref, 0.1) == found
    whole = store.get(path)
    for damaged in (b"{", whole.replace(b'"images":', b'"Images":', 1), b"[]"):
        store.put(path, damaged)
        assert read_repeated(store, ref, 0.1) is None
        assert find_repeated(store, ref, 0.1) == found and store.get(path) == whole, "counted again, to the same bytes"


def test_another_manifest_and_another_share_have_records_of_their_own(tmp_path):
    store = open_store(str(tmp_path))
    entries = write_captions(store, [["a photo"] * 30 + ["a cat"] * 70])
    first = commit(store, entries)
    assert len(find_repeated(store, first, 0.5).captions) == 1 and len(find_repeated(store, first, 0.2).captions) == 2
    grown = commit(store, [*entries, *write_captions(store, [[f"caption {i}" for i in range(100)]], first=1)])
    assert find_repeated(store, grown, 0.5).captions == {}
    assert len(find_repeated(store, first, 0.5).captions) == 1


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda store, path: store.delete(path), "its index is gone; delete its done record and run the caption stage"),
        (lambda store, path: store.put(path, b"x"), "its bytes are not those of its manifest"),
    ],
)
def test_an_index_that_is_gone_or_damaged_is_named(tmp_path, harm, said):
    store = open_store(str(tmp_path))
    entries = write_captions(store, [["a photo"] * 30])
    harm(store, f"{FOLDER}/{entries[0].stem}{INDEX}")
    with pytest.raises(DataError, match=f"00000.000000000000.*{said}"):
        find_repeated(store, commit(store, entries), 0.1)


def test_a_shard_is_done_when_its_index_is(tmp_path):
    """The record is last, and says what the index is."""
    store = open_store(str(tmp_path))
    order, put = [], store.put
    store.put = lambda path, data: (order.append(path), put(path, data))
    [entry] = write_captions(store, [["a cat"]])
    assert [path.partition(entry.stem)[2] for path in order] == [".parquet", INDEX, DONE]
    record = read_shard_done(store, FOLDER, entry.stem)
    assert record.files[INDEX] == entry.index_digest and record.digest == record.files[".parquet"]


def test_a_table_without_an_index_is_written_as_before(tmp_path):
    """Golden: the drawn world's captions stay what they were, to the byte."""
    store = open_store(str(tmp_path))
    table = pa.table({"key": ["a"], "caption": ["A red circle."], "model": ["small_world"], "prompt": [""]})
    record = write_table(store, FOLDER, shard_stem(0, "0" * 12), table, [FailedRow(key="b", reason="r")])
    assert (
        sorted(record.files) == [".parquet"]
        and record.extra == {}
        and record.bytes == store.size(f"{FOLDER}/00000.{'0' * 12}.parquet")
    )
    assert ShardEntry.of(record).index_digest is None


def test_a_larger_data_set_is_sampled_by_its_keys_alone(monkeypatch, tmp_path):
    """A share of 10 % in a sample of 2,000 of 20,000 is off by 0.7 % (one standard deviation)."""
    monkeypatch.setattr(repeated, "SAMPLED_IMAGES", 2_000)
    store, bound = open_store(str(tmp_path)), sample_bound(20_000)
    shards = [["often" if i % 10 == 0 else f"caption {n} {i}" for i in range(1_000)] for n in range(20)]
    found = find_repeated(store, commit(store, write_captions(store, shards, bound)), 0.07)
    assert found.sampled == pytest.approx(0.1) and 1_850 < found.images < 2_150
    assert [one.text for one in found.captions.values()] == ["often"] and found.share == pytest.approx(0.1, abs=0.028)
    index = caption_index([(f"k{i}", "c") for i in range(1_000)], bound)
    assert set(index["key_hash"].to_pylist()) == {n for i in range(1_000) if (n := sample_id(f"k{i}")) < bound}
    # shards of when the data set was smaller hold all their rows, and are thinned out to the same sample
    mixed = commit(
        store, write_captions(store, shards[:10], HASHES) + write_captions(store, shards[10:], bound, first=10)
    )
    again = find_repeated(store, mixed, 0.07)
    assert (again.images, again.sampled, again.captions) == (found.images, found.sampled, found.captions)


class CountingIndexes:
    """In place of a store's 100,000 indexes of a thousand images each: one a hundred of whose rows are sampled."""

    def __init__(self, bound: int) -> None:
        self.bound, self.reads = bound, 0
        self.random = np.random.default_rng(0)

    def __call__(self, store, folder, stem, digest) -> pa.Table:
        self.reads += 1
        keys = self.random.integers(0, self.bound, 10)
        captions = np.where(self.random.random(10) < 0.002, 77, self.random.integers(100, HASHES - 1, 10))
        return pa.table({"key_hash": keys, "caption_hash": captions}).replace_schema_metadata(
            {"bound": str(self.bound)}
        )


def test_a_hundred_million_images_cost_a_request_a_shard_and_the_sample_in_memory(tmp_path, monkeypatch):
    """A tenth of them, 10,000 shards of a thousand: what is held follows the sample, of 100,000 here and a million there."""
    shards, rows = 10_000, 1_000
    monkeypatch.setattr(repeated, "SAMPLED_IMAGES", 10 * shards)
    bound = sample_bound(shards * rows)
    indexes = CountingIndexes(bound)
    monkeypatch.setattr(repeated, "read_shard_index", indexes)
    monkeypatch.setattr(repeated, "_texts", lambda *_: {})
    store = open_store(str(tmp_path))
    entries = [
        ShardEntry(number=n, stem=shard_stem(n, "0" * 12), rows=rows, bytes=1, digest="0" * 64) for n in range(shards)
    ]
    ref = commit(store, entries)
    manifest = repeated.read_manifest(store, ref.folder, ref.digest)
    monkeypatch.setattr(repeated, "read_manifest", lambda *_: manifest)
    tracemalloc.start()
    began = time.process_time()
    found = find_repeated(store, ref, 0.001)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert indexes.reads == shards
    assert list(found.captions) == [77] and found.share == pytest.approx(0.002, abs=0.0006)
    assert peak < 40e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 60
