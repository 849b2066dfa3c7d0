"""Which rows' captions are drawn for people: the same for all checkpoints, and only what the phase trains on."""

from __future__ import annotations

import pytest
from small_shards import split_of, write_latents

from sd3core.data import compared_rows as module
from sd3core.data.compared_rows import compared_rows
from sd3core.data.ingest import RAW_SCHEMA
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.shards import Sample, write_shard
from sd3core.data.store import open_store

SHARDS, ROWS = 3, 40


@pytest.fixture
def data(tmp_path):
    """Raw shards, and latents of all rows but the last eight of each shard; every third row has no caption."""
    store = open_store(str(tmp_path))
    raw, latents = [], []
    for number in range(SHARDS):
        samples = []
        for row in range(ROWS):
            key = f"image-{number}-{row:03d}"
            about = {"width": 8, "height": 8, "source": "x", "caption": f"of {key}" if row % 3 else ""}
            samples.append(Sample(key, {"png": b"p"}, about | {"split": split_of(key)}))
        raw.append(ShardEntry.of(write_shard(store, "raw", f"{number:05d}.0", samples, [], RAW_SCHEMA)))
        latents.append(write_latents(store, "latents", number, ROWS - 8))
    common = {"spec": "0" * 12, "inputs": {}, "fields": {}}
    manifests = (
        Manifest(stage="raw", folder="raw", shards=raw, **common),
        Manifest(stage="latents", folder="latents", shards=latents, **common),
    )
    return store, *manifests


def test_half_are_trained_on_and_half_held_out_and_all_have_latents(data):
    found = compared_rows(*data, 4, held_out=True, captioned=True)
    assert [split for split, _ in found] == ["train"] * 4 + ["held_out"] * 4
    for split, row in found:
        assert split_of(row.key) == split and int(row.key[-3:]) < ROWS - 8 and row.caption == f"of {row.key}"
    assert found == compared_rows(*data, 4, held_out=True, captioned=True)
    keys = {row.key for _, row in compared_rows(*data, 100, held_out=True, captioned=False)}
    assert len(keys) == SHARDS * (ROWS - 8)


def test_where_nothing_is_held_out_no_index_is_read_for_it(data):
    store, raw, latents = data
    read = []
    get, store.get = store.get, lambda path: read.append(path) or get(path)
    assert {split for split, _ in compared_rows(store, raw, latents, 2, held_out=False, captioned=True)} == {"train"}
    assert len(read) == 2  # a raw index, and that of its latents


def test_of_rows_that_are_rare_only_so_many_shards_are_looked_through(data, monkeypatch):
    """Of 100,000 shards without a caption it would be a request for each."""
    store, raw, latents = data
    monkeypatch.setattr(module, "MOST_SHARDS", 2)
    read = []
    get, store.get = store.get, lambda path: read.append(path) or get(path)
    found = compared_rows(store, raw, latents, 1_000, held_out=True, captioned=True)
    assert len({row.stem for _, row in found}) == 2
    assert len(read) == 2 * 2 * 2  # splits, shards, and two indexes of each
