"""Rows are found in shards that were made before, on both kinds of store, and only where the digests are right."""

from __future__ import annotations

import pyarrow as pa
import pytest

from sd3core.data.earlier_rows import EarlierRows, row_name
from sd3core.data.shards import Sample, write_shard, write_table
from sd3core.errors import StoreError

FOLDER = "datasets/d/latents/0123456789ab"


def a_shard(store, number: int, **rows: str) -> str:
    """Rows by key, each with the digest of its image, and bytes that say both."""
    stem = f"{number:05d}.{'a' * 12}"
    samples = [
        Sample(key, {"safetensors": f"{key} of {image}".encode()}, {"image_digest": image, "bucket": "64x64"})
        for key, image in rows.items()
    ]
    schema = pa.schema([("image_digest", pa.string()), ("bucket", pa.string())])
    write_shard(store, FOLDER, stem, samples, [], schema)
    return stem


def found_in(store, stems, wanted):
    with EarlierRows(store, FOLDER, stems) as earlier:
        rows = earlier.find(wanted, row_name)
        found = {name: row.files()["safetensors"].decode() for name, row in rows.items()}
    return found, earlier.told


def test_rows_come_with_their_bytes_from_the_first_shard_that_has_them(store):
    stems = [a_shard(store, 1, k1="i1", k2="i2"), a_shard(store, 2, k2="other", k3="i3"), a_shard(store, 3, k1="i1")]
    found, told = found_in(store, stems, {("k1", "i1"), ("k2", "other"), ("k3", "changed"), ("k9", "i9")})
    assert found == {("k1", "i1"): "k1 of i1", ("k2", "other"): "k2 of other"} and told == []
    assert found_in(store, [], {("k1", "i1")}) == ({}, [])


@pytest.mark.parametrize("suffix", [".done.json", ".index.parquet", ".tar"])
@pytest.mark.parametrize("harm", ["gone", "altered", "cut short"])
def test_a_damaged_shard_is_told_and_the_next_one_is_looked_at(store, suffix, harm):
    stems = [a_shard(store, 1, k1="i1"), a_shard(store, 2, k1="i1", k2="i2")]
    path = f"{FOLDER}/{stems[0]}{suffix}"
    data = store.get(path)
    store.delete(path)
    if harm != "gone":
        store.put(path, data[:-600] if harm == "cut short" and len(data) > 600 else b"X" + data[1:])
    found, told = found_in(store, stems, {("k1", "i1")})
    assert found == {("k1", "i1"): "k1 of i1"}
    (line,) = told
    assert stems[0] in line and line.endswith("damaged or gone; what was to be taken from it is made again")


def test_a_store_that_is_away_is_no_damage(store, monkeypatch):
    """The shard is tried again later; its rows are not made anew because of a moment without a network."""
    stems = [a_shard(store, 1, k1="i1")]

    def away(self, path):
        raise StoreError("it cannot be reached")

    monkeypatch.setattr(type(store), "get", away)
    with pytest.raises(StoreError, match="cannot be reached"):
        found_in(store, stems, {("k1", "i1")})


def test_what_was_fetched_goes(store, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("sd3-earlier-*"))
    assert found_in(store, [a_shard(store, 1, k1="i1")], {("k1", "i1")})[0]
    assert sorted(tmp_path.rglob("sd3-earlier-*")) == before == []


def test_rows_of_tables(store):
    stems = []
    for number, caption in ((1, "first"), (2, "second")):
        stem = f"{number:05d}.{'a' * 12}"
        write_table(store, FOLDER, stem, pa.table({"key": ["k", caption], "caption": [caption] * 2}), [])
        stems.append(stem)
    with EarlierRows(store, FOLDER, stems) as earlier:
        found = earlier.find_in_tables({("k", None), ("second", None), ("third", None)}, row_name)
    assert {name: row["caption"] for name, row in found.items()} == {("k", None): "first", ("second", None): "second"}
    assert earlier.told == []
