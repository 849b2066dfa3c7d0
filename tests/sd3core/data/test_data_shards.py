"""A shard: read by webdataset, bytes fixed for ever, found finished or not at all, the same when it is made again."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import pyarrow as pa
import pytest

from sd3core.data.shards import (
    FailedRow,
    Sample,
    check_digest,
    finished_stems,
    is_held_out,
    parts_digest,
    read_raw_samples,
    read_samples,
    read_shard_done,
    read_shard_index,
    read_table,
    sample_id,
    shard_stem,
    write_shard,
    write_table,
)  # fmt: skip
from sd3core.data.store import open_store
from sd3core.errors import DataError, StoreError

STEM = shard_stem(42, "0123456789abcdef")
FOLDER = "datasets/d/raw/spec"
SAMPLES = [
    Sample("first", {"png": b"\x89PNG one", "json": b'{"caption": "a"}'}, {"width": 3, "bucket": "64x64"}),
    Sample("second", {"jpg": b"x" * 1000, "json": b"{}"}, {"width": 4, "bucket": "64x48"}),
    Sample("third", {"json": b""}, {"width": 5, "bucket": "64x64"}),
]


def test_what_is_written_is_read(store):
    failed = []

    def samples():
        yield from SAMPLES[:2]
        failed.append(FailedRow(key="bad", reason="empty file"))
        yield SAMPLES[2]

    record = write_shard(store, FOLDER, STEM, samples(), failed, count_by="bucket")
    tar = store.get(f"{FOLDER}/{STEM}.tar")
    assert [path.path.rpartition("/")[2] for path in store.list(FOLDER)] == [
        f"{STEM}{s}" for s in (".done.json", ".index.parquet", ".tar")
    ]
    assert list(read_samples(tar)) == [(sample.key, sample.files) for sample in SAMPLES]
    index = read_shard_index(store, FOLDER, STEM, record.files[".index.parquet"]).to_pylist()
    for row, sample in zip(index, SAMPLES, strict=True):
        assert {name: row[name] for name in ("key", "width", "bucket")} == {"key": sample.key, **sample.row}
        part = store.get_range(f"{FOLDER}/{STEM}.tar", row["offset"], row["length"])
        assert list(read_samples(part)) == [(sample.key, sample.files)]  # one range is one sample
    assert record == read_shard_done(store, FOLDER, STEM)
    assert (record.number, record.stem, record.rows, record.extra) == (42, STEM, 3, {"64x48": 1, "64x64": 2})
    assert record.failed == [FailedRow(key="bad", reason="empty file")]
    assert record.digest == record.files[".tar"] == hashlib.sha256(tar).hexdigest()
    assert record.bytes == sum(entry.size for entry in store.list(FOLDER) if "done" not in entry.path)
    assert finished_stems(store, FOLDER).keys() == {STEM}


def test_webdataset_reads_it(file_store):
    webdataset = pytest.importorskip("webdataset")
    write_shard(file_store, FOLDER, STEM, SAMPLES, [])
    url = str(file_store.local_path(f"{FOLDER}/{STEM}.tar"))
    found = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [item["__key__"] for item in found] == ["first", "second", "third"]
    for item, sample in zip(found, SAMPLES, strict=True):
        assert {name: item[name] for name in sample.files} == sample.files


def test_golden_bytes(file_store):
    """The format itself. Where this changes on purpose, raise the number in specs.FORMATS: caches must not be mixed."""
    record = write_shard(file_store, FOLDER, STEM, SAMPLES, [])
    assert record.digest == "0ff34ef0709d70f67030e33fd3bfd093863abdc2e8c9c4c54925104ce49b26c2"
    header = file_store.get(f"{FOLDER}/{STEM}.tar")[:512]
    assert (
        header.startswith(b"first.png\0") and header[257:265] == b"ustar\x0000" and header[136:148] == b"00000000000\0"
    )
    rows = [
        (row["key"], row["offset"], row["length"]) for row in read_shard_index(file_store, FOLDER, STEM).to_pylist()
    ]
    assert rows == [("first", 0, 2048), ("second", 2048, 2560), ("third", 4608, 512)]


def test_names_and_draws_are_fixed_for_ever():
    assert STEM == "00042.0123456789ab" and shard_stem(123456, "f" * 64) == "123456.ffffffffffff"
    assert parts_digest("a", b"bc") == "3fafa1cf2f19" != parts_digest("ab", b"c")
    assert sample_id("scene-0-00000000") == 8726805590055815107 and 0 <= sample_id("x") < 2**63
    keys = [f"key-{number}" for number in range(4000)]
    held = [key for key in keys if is_held_out(key, 0.05)]
    assert held[:3] == ["key-11", "key-21", "key-31"] and 150 < len(held) < 250
    assert set(held) <= {key for key in keys if is_held_out(key, 0.06)}  # a larger part holds the smaller one
    assert not any(is_held_out(key, 0.0) for key in keys) and all(is_held_out(key, 1.0) for key in keys)


def test_rows_that_share_a_file(store):
    """As text shards have them: one caption's features, several keys."""
    samples = [
        Sample("caption", {"safetensors": b"features"}, {"key": "a", "kind": "original"}),
        Sample("caption", {}, {"key": "b", "kind": "original", "offset": 0, "length": 1024}),
    ]
    record = write_shard(store, FOLDER, STEM, samples, [])
    index = read_shard_index(store, FOLDER, STEM).to_pylist()
    assert [(row["key"], row["offset"], row["length"]) for row in index] == [
        ("a", 0, 1024),
        ("b", 0, 1024),
    ] and record.rows == 2
    assert list(read_raw_samples(store, FOLDER, STEM, record.digest)) == [("caption", {"safetensors": b"features"})]


def test_an_empty_shard_keeps_its_columns(store):
    schema = pa.schema([("width", pa.int32()), ("split", pa.string())])
    record = write_shard(store, FOLDER, STEM, [], [FailedRow(key="x", reason="y")], schema, count_by="split")
    assert record.rows == 0 and record.extra == {}
    assert read_shard_index(store, FOLDER, STEM).column_names == ["key", "offset", "length", "width", "split"]
    assert list(read_samples(store.get(f"{FOLDER}/{STEM}.tar"))) == []


def test_tables(store):
    table = pa.table({"key": ["a", "b"], "caption": ["one", None]})
    record = write_table(store, FOLDER, STEM, table, [FailedRow(key="c", reason="r")])
    assert read_table(store, FOLDER, STEM, record.digest).equals(table) and record == read_shard_done(
        store, FOLDER, STEM
    )
    assert record.files == {".parquet": record.digest} and finished_stems(store, FOLDER).keys() == {STEM}


def test_an_interrupted_shard_has_no_done_record_and_is_redone_the_same(store):
    whole = write_shard(store, "elsewhere", STEM, SAMPLES, [])

    def broken():
        yield SAMPLES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(store, FOLDER, STEM, broken(), [])
    assert store.list(FOLDER) == []
    real_put = store.put
    for stop in (".index.parquet", ".done.json"):  # killed between two of its files

        def put(path, data, stop=stop):
            if path.endswith(stop):
                raise KeyboardInterrupt
            real_put(path, data)

        store.put = put
        with pytest.raises(KeyboardInterrupt):
            write_shard(store, FOLDER, STEM, SAMPLES, [])
        assert finished_stems(store, FOLDER).keys() == set()
    store.put = real_put
    again = write_shard(store, FOLDER, STEM, SAMPLES, [])
    assert again == whole and finished_stems(store, FOLDER).keys() == {STEM}


KILLED = """
import os, signal, sys
from sd3core.data.shards import Sample, write_shard
from sd3core.data.store import open_store
def samples():
    yield Sample("a", {"x": b"1"})
    os.kill(os.getpid(), signal.SIGKILL)
write_shard(open_store(sys.argv[1]), "f", "00000.0123456789ab", samples(), [])
"""


def test_a_killed_process_leaves_nothing(file_store):
    assert subprocess.run([sys.executable, "-c", KILLED, file_store.url], check=False).returncode == -9
    assert file_store.list() == []


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a\\b", "first"])
def test_keys_that_readers_would_confuse_are_refused(file_store, key):
    with pytest.raises(ValueError, match="sample key"):
        write_shard(file_store, FOLDER, STEM, [SAMPLES[0], Sample(key, {"x": b""})], [])
    assert file_store.list() == []


def test_damage_is_told(store):
    record = write_shard(store, FOLDER, STEM, SAMPLES, [])
    tar = store.get(f"{FOLDER}/{STEM}.tar")
    store.put(f"{FOLDER}/{STEM}.tar", tar[:700] + b"!" + tar[701:])
    with pytest.raises(DataError, match=rf"{STEM}.tar: its bytes are not those .* delete {STEM}.done.json"):
        list(read_raw_samples(store, FOLDER, STEM, record.digest))
    for broken in (tar[:520], b"\x01" * 512, tar[:1000]):
        with pytest.raises(DataError, match="make its shard again"):
            list(read_samples(broken))
    store.put(f"{FOLDER}/{STEM}.index.parquet", b"PAR1")
    with pytest.raises(DataError, match="its bytes are not those"):
        read_shard_index(store, FOLDER, STEM, record.files[".index.parquet"])
    with pytest.raises(DataError, match="not a parquet file"):
        read_shard_index(store, FOLDER, STEM)
    store.put(f"{FOLDER}/{STEM}.done.json", b'{"rows": 1}')
    with pytest.raises(DataError, match="not a done record of this version"):
        read_shard_done(store, FOLDER, STEM)
    check_digest(b"", hashlib.sha256(b"").hexdigest(), "uri")


def test_a_full_temporary_folder_is_one_line(file_store):
    class Full(io.BytesIO):
        def read(self, *arguments):
            raise OSError(28, "No space left on device")

    from sd3core.data import shards

    real, shards.io.BytesIO = shards.io.BytesIO, Full
    try:
        with pytest.raises(StoreError, match="temporary folder .* No space left on device"):
            write_shard(file_store, FOLDER, STEM, SAMPLES, [])
    finally:
        shards.io.BytesIO = real


def test_finished_stems_looks_at_this_folder_only(store):
    for path in (
        f"{FOLDER}/{STEM}.tar",
        f"{FOLDER}/00001.a.done.json",
        f"{FOLDER}/deeper/00002.a.done.json",
        f"{FOLDER}x/00003.a.done.json",
    ):
        store.put(path, b"")
    assert finished_stems(open_store(store.url), FOLDER).keys() == {"00001.a"}
