"""The photographs as tars and as a parquet are what img2dataset, webdataset and Hugging Face's datasets make."""

from __future__ import annotations

import io
import json

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from sd3core.data.photographs import PHOTOGRAPHS, read_photographs
from sd3core.data.sources.photograph_files import put_photographs
from sd3core.data.store import open_store


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    return open_store(
        str(tmp_path / "x") if request.param == "file" else f"s3://{request.getfixturevalue('s3_bucket')}/photos"
    )


def test_tars_are_read_by_webdataset_and_have_img2datasets_files_beside_them(store, tmp_path):
    count, names = put_photographs(store, "tars")
    assert count == len(PHOTOGRAPHS) == 16 and names[-1].endswith("_stats.json")
    found = []
    for number in range(2):
        local = tmp_path / f"{number:05d}.tar"
        store.get_file(local.name, local)
        found += list(webdataset.WebDataset(str(local), shardshuffle=False))
        table = pq.read_table(io.BytesIO(store.get(f"{number:05d}.parquet"))).to_pylist()
        assert [row["status"] for row in table] == ["success"] * 8
        assert store.get_json(f"{number:05d}_stats.json")["successes"] == 8
    assert [sample["txt"].decode() for sample in found] == [caption for *_, caption in PHOTOGRAPHS.values()]
    assert len({sample["__key__"] for sample in found}) == 16
    for sample in found:
        image = Image.open(io.BytesIO(sample.get("jpg") or sample["png"]))
        about = json.loads(sample["json"])
        assert image.size == (about["width"], about["height"]) and about["key"] == sample["__key__"]


def test_a_parquet_has_hugging_faces_struct(store):
    _, (name,) = put_photographs(store, "parquet")
    rows = pq.read_table(io.BytesIO(store.get(name))).to_pylist()
    for row, photograph in zip(rows, read_photographs(), strict=True):
        assert row["image"] == {"bytes": photograph.content, "path": photograph.file_name}
        assert row["caption"] == photograph.caption


def test_a_folder_may_be_in_a_bucket(store):
    count, names = put_photographs(store, "folder")
    assert len(names) == 2 * count and store.get("cat.txt").decode().startswith("A close-up of the face of a ginger")
