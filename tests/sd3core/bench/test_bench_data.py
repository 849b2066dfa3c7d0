"""All ways of reading read the same rows, and leave nothing; how fast they are is not tested."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from flows.cli.commands import app
from sd3core.bench import data as bench_data
from sd3core.bench.data import (
    BOTO3,
    LOADER,
    WEBDATASET,
    DataBench,
    DataResult,
    measure_data,
    one_core,
    read_by_boto3,
    read_by_loader,
    read_by_webdataset,
)
from sd3core.data.store import open_store
from sd3core.errors import UserError

TINY = DataBench(shards=3, rows=10, side_px=16, tokens=2, batch=5, rounds=1)
READERS = {LOADER: read_by_loader, WEBDATASET: read_by_webdataset, BOTO3: read_by_boto3}


@pytest.fixture
def read_rows(monkeypatch):
    """What each way has read, by a digest of one value a row."""
    found = {}
    for name, function in READERS.items():

        def reading(*arguments, name=name, function=function):
            found.setdefault(name, []).append(function(*arguments))

        monkeypatch.setattr(bench_data, function.__name__, reading)
    return found


def test_on_files_the_loader_and_webdataset_read_the_same_rows(tmp_path, read_rows):
    store = open_store(tmp_path.as_uri())
    result = measure_data(TINY, store, say=lambda line: None)
    assert list(result.seconds) == list(read_rows) == [LOADER, WEBDATASET]
    assert read_rows[LOADER] == read_rows[WEBDATASET] and len({*read_rows[LOADER]}) == 1
    assert result.rows == 30
    assert not store.list("")


def test_on_s3_the_loader_and_boto3_read_the_same_rows(s3_bucket, read_rows):
    store = open_store(f"s3://{s3_bucket}/some/where")
    measure_data(TINY, store, say=lambda line: None)
    assert list(read_rows) == [LOADER, BOTO3] and read_rows[LOADER] == read_rows[BOTO3]
    assert not store.list("")


def test_shards_go_also_when_reading_fails(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no")

    monkeypatch.setattr(bench_data, "read_by_webdataset", fails)
    store = open_store(tmp_path.as_uri())
    with pytest.raises(OSError):
        measure_data(TINY, store, say=lambda line: None)
    assert not store.list("")


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path):
    store = open_store(tmp_path.as_uri())
    with pytest.raises(
        UserError, match=r"GB of shards where .* GB are free; fewer --shards or --rows, or another --store$"
    ):
        measure_data(replace(TINY, shards=10_000, rows=10_000, tokens=500), store)
    assert not store.list("")


def test_one_core_ends_with_the_block():
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before


def test_the_ratio_is_that_of_the_rates():
    result = DataResult(10, 1, {LOADER: [2.0, 4.0, 2.0], WEBDATASET: [1.0, 2.0, 1.0]})
    assert result.ratio(WEBDATASET) == 0.5


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path):
    out = tmp_path / "figures.json"
    done = CliRunner().invoke(
        app,
        ["bench", "data", "--shards", "1", "--rows", "4", "--batch", "2", "--rounds", "1", "--json", str(out)],
    )
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()[-2:]] == [LOADER, WEBDATASET]
    assert json.loads(out.read_text())["result"]["rows"] == 4


def test_a_batch_that_an_epoch_does_not_fill_is_refused():
    done = CliRunner().invoke(app, ["bench", "data", "--shards", "1", "--rows", "4", "--batch", "5"])
    assert str(done.exception) == "--batch 5 is more than the 4 rows of an epoch; lower it, or raise --rows"
