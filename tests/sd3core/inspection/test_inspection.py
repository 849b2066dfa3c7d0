"""Objects of any origin, on files and on S3: what is said of them, and how much of them is read."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd3core.data.encoded_shards import FEATURES
from sd3core.data.manifest import Manifest, ShardEntry, commit_manifest
from sd3core.data.shards import Sample, write_shard, write_table
from sd3core.data.store import open_store
from sd3core.errors import DataError, UserError
from sd3core.inspection import inspect_stored
from sd3core.inspection.contact_sheet import SHEET_CELL_PX, contact_sheet

GREEN = (10, 200, 30)


def no_vae(folder: str, digest: str) -> None:
    raise AssertionError("no latents here")


def jpeg(colour=GREEN, size=(40, 20)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, colour).save(sink, "PNG")
    return sink.getvalue()


def foreign_tar(members: list[tuple[str, bytes]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@pytest.fixture(params=["file", "s3"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "file" else f"s3://{request.getfixturevalue('s3_bucket')}/at"


def test_a_raw_shard_by_any_of_its_names_reads_the_rows_that_are_shown(url, monkeypatch):
    store = open_store(url)
    samples = [Sample(f"k{n}", {"png": jpeg(), "json": b"{}"}, {"caption": f"thing {n}"}) for n in range(9)]
    schema = pa.schema([("caption", pa.string())])
    write_shard(store, "datasets/d/raw/spec", "00000.aaaaaaaaaaaa", samples, [], schema)
    read = []
    whole = type(store).get_range
    monkeypatch.setattr(type(store), "get_range", lambda self, *asked: read.append(asked[0]) or whole(self, *asked))
    for ending in ("", ".tar", ".index.parquet", ".done.json"):
        found = inspect_stored(f"{store.url}/datasets/d/raw/spec/00000.aaaaaaaaaaaa{ending}", 3, no_vae)
        assert found.title == "raw shard 00000.aaaaaaaaaaaa: 9 rows"
        assert [row.key for row in found.rows] == ["k0", "k1", "k2"] and found.rows[1].words == {"caption": "thing 1"}
        assert found.rows[0].picture.shape == (20, 40, 3) and tuple(found.rows[0].picture[5, 5]) == GREEN
    assert len(read) == 12


def test_of_a_large_picture_what_a_sheet_shows_is_held(tmp_path):
    store = open_store(str(tmp_path))
    store.put("in/00000.tar", foreign_tar([("a.png", jpeg(size=(2_000, 1_000)))]))
    [row] = inspect_stored(f"{store.url}/in/00000.tar", 2, no_vae).rows
    assert row.picture.shape == (SHEET_CELL_PX // 2, SHEET_CELL_PX, 3) and tuple(row.picture[5, 5]) == GREEN


def test_a_latent_that_is_damaged_is_said_in_its_row(tmp_path):
    store, folder, stem = open_store(str(tmp_path)), "datasets/d/latents/0123456789ab", "00000.aaaaaaaaaaaa"
    samples = [Sample(key, {ending: b"nothing"}, {"bucket": "32x32"}) for key, ending in (("a", FEATURES), ("b", "x"))]
    record = write_shard(store, folder, stem, samples, [], pa.schema([("bucket", pa.string())]))
    made = {"stage": "latents", "spec": "0", "fields": {"vae": "d" * 64}, "inputs": {}, "folder": folder}
    commit_manifest(store, folder, Manifest(**made, shards=[ShardEntry.of(record)]))
    found = inspect_stored(f"{store.url}/{folder}/{stem}", 5, lambda *_: object())
    assert [row.picture for row in found.rows] == ["damaged: it holds no latent"] * 2


def test_a_table_and_the_folders_above(url):
    store = open_store(url)
    table = pa.table({"key": ["a", "b"], "caption": ["one", "x" * 400], "feature": [b"ab", b"cd"]})
    beside = pa.table({"why": ["it is like another"]})
    write_table(store, "datasets/d/captions/spec", "00000.aaaaaaaaaaaa", table, [], beside)
    found = inspect_stored(f"{store.url}/datasets/d/captions/spec/00000.aaaaaaaaaaaa.parquet", 5, no_vae)
    assert [row.words["caption"][:3] for row in found.rows] == ["one", "xxx"]
    assert len(found.rows[1].words["caption"]) < 310 and found.rows[0].picture == ""
    of_index = inspect_stored(f"{store.url}/datasets/d/captions/spec/00000.aaaaaaaaaaaa.index.parquet", 5, no_vae)
    assert [row.words for row in of_index.rows] == [{"why": "it is like another"}]
    assert inspect_stored(f"{store.url}/datasets", 5, no_vae).tables["folders"] == [
        {"folder": "d", "holds": "captions"}
    ]
    files = inspect_stored(f"{store.url}/datasets/d/captions/spec/", 5, no_vae)
    assert files.title == "a folder of files" and len(files.tables["files"]) == 3
    with pytest.raises(UserError, match="nothing stands there"):
        inspect_stored(f"{store.url}/datasets/e", 5, no_vae)


def test_a_tar_from_elsewhere_is_read_from_its_beginning(url, monkeypatch):
    """Also one with hostile names and damaged images; a member that the part that was read ends in is left out."""
    members = [("../../a.b.jpg", jpeg()), ("../../a.json", b'{"caption": "x\x1b[2J"}'), ("c/d.png", b"no image")]
    members += [(f"e{n}.png", bytes(300_000)) for n in range(20)]
    store = open_store(url)
    store.put("in/00000.tar", foreign_tar(members))
    read = []
    whole = type(store).get_range
    monkeypatch.setattr(type(store), "get_range", lambda self, *asked: read.append(asked[2]) or whole(self, *asked))
    found = inspect_stored(f"{store.url}/in/00000.tar", 2, no_vae)
    assert [row.key for row in found.rows] == ["../../a", "c/d"] and sum(read) == 1_000_000
    assert found.rows[0].picture.shape == (20, 40, 3) and "UTF" not in found.rows[0].words["json"]
    assert isinstance(found.rows[1].picture, str) and found.rows[1].picture
    assert found.notes == ["of the tar the first 1.00 MB were read"]
    store.put("in/bad.tar", b"x" * 5_000)
    with pytest.raises(DataError, match="bad.tar: not a plain tar"):
        inspect_stored(f"{store.url}/in/bad.tar", 2, no_vae)


def test_a_parquet_of_images_from_elsewhere(url):
    store, sink = open_store(url), io.BytesIO()
    rows = [{"image": {"bytes": jpeg(), "path": "a.jpg"}, "text": "a leaf"}, {"image": None, "text": "none"}]
    pq.write_table(pa.Table.from_pylist(rows), sink)
    store.put("in/train.parquet", sink.getvalue())
    found = inspect_stored(f"{store.url}/in/train.parquet", 5, no_vae)
    assert found.facts["rows"] == "2 in 1 row groups" and found.rows[1].picture == ""
    assert found.rows[0].picture.shape == (20, 40, 3)
    store.put("in/bad.parquet", b"PAR1 nothing")
    with pytest.raises(DataError, match=r"bad.parquet: not a parquet file"):
        inspect_stored(f"{store.url}/in/bad.parquet", 5, no_vae)
    store.put("in/notes.txt", b"x")
    with pytest.raises(UserError, match=r"notes.txt: neither a shard"):
        inspect_stored(f"{store.url}/in/notes.txt", 5, no_vae)


def test_a_record_with_a_long_field(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": {"b": "y" * 1_000}, "c": [1]}))
    facts = inspect_stored(str(tmp_path / "x.json"), 5, no_vae).facts
    assert len(facts["a.b"]) < 210 and facts["c"] == "[1]"


def test_a_sheet_has_a_cell_for_each_picture_whatever_its_size():
    sizes = ((8, 16), (900, 100), (192, 192))
    pictures = [(n, np.full((h, w, 3), 128, np.uint8), "words " * 60) for n, (h, w) in enumerate(sizes, 1)]
    sheet = contact_sheet(pictures, columns=2, side_px=96)
    assert sheet.shape[1] == 2 * 96 + 8 and sheet.shape[0] > 2 * 96
    assert (sheet[:96, :96] == 128).any() and (sheet[96:156, :96] < 100).any()
