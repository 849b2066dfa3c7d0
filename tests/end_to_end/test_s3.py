"""The same chain with its store on S3: nothing lands beside it, and what is made equals what the killed run made on files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import FEW_SCORES, OVERRIDES, RUN
from swift_server import SwiftServer

from sd3core.data.store import Store, open_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

BUCKET = "sd3"
URL = f"s3://{BUCKET}/team/tests"


@pytest.fixture(scope="module")
def bucket(installation) -> Iterator[Store]:
    """An S3 server where the services look for one, and a store in it that this process can read."""
    with s3_server_at(installation.s3_port), pytest.MonkeyPatch.context() as patch:
        for name, value in installation.environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
        yield open_store(URL)


@contextmanager
def s3_server_at(port: int) -> Iterator[None]:
    """moto, or a real one where SD3_SWIFT says where that is installed."""
    if "SD3_SWIFT" in os.environ:
        swift = SwiftServer(Path(os.environ["SD3_SWIFT"]), port)
        try:
            swift.start()
            yield
        finally:
            swift.close()
        return
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    try:
        yield
    finally:
        server.stop()


@dataclass(frozen=True)
class OnS3:
    printed: str
    summary: dict[str, Any]
    local_before: dict
    local_after: dict


@pytest.fixture(scope="module")
def on_s3(installation, resumed, bucket) -> OnS3:
    before = installation.files("")
    printed = installation.demo([*OVERRIDES, *FEW_SCORES, "compute.actors=2", f"store={URL}"])
    return OnS3(printed, bucket.get_json(f"{RUN}/summary.json"), before, installation.files(""))


def test_the_chain_runs_on_s3(on_s3):
    assert {stage["state"] for stage in on_s3.summary["stages"]} == {"done"}
    assert all(stage["manifest"].startswith(f"{URL}/") for stage in on_s3.summary["stages"])
    assert on_s3.summary["export"].startswith(f"{URL}/")
    assert f"{URL}/{RUN}/summary.json" in on_s3.printed


def test_nothing_is_written_to_the_local_store(on_s3):
    assert on_s3.local_after == on_s3.local_before


def test_data_and_towers_are_the_same_bytes_as_on_files(on_s3, resumed, bucket, installation):
    """Two machines that make the same shard make it alike: the manifests' digests are those of all shards and fields."""
    made = {stage["name"]: stage["digest"] for stage in on_s3.summary["stages"]}
    there = {stage["name"]: stage["digest"] for stage in resumed.summary["stages"]}
    assert {name: made[name] for name in ("ingest", "caption", "encode")} == {
        name: there[name] for name in ("ingest", "caption", "encode")
    }
    tars = [
        entry.path for entry in bucket.list("datasets/") if entry.path.endswith((".tar", ".parquet", ".safetensors"))
    ]
    assert tars == [
        path
        for path in resumed.files
        if path.startswith("datasets/") and path.endswith((".tar", ".parquet", ".safetensors"))
    ]


def test_losses_are_those_of_the_run_that_was_killed(on_s3, bucket, installation, resumed):
    """Undisturbed on S3, killed and gone on with on files: the same losses, step by step."""
    undisturbed = losses(
        path.decode()
        for path in (
            bucket.get(e.path) for e in bucket.list(f"{RUN}/checkpoints/pretrain/") if e.path.endswith("metrics.jsonl")
        )
    )
    checkpoints = sorted(
        path
        for path in resumed.files
        if path.startswith(f"{RUN}/checkpoints/pretrain/") and path.endswith("metrics.jsonl")
    )
    killed = losses((installation.store / path).read_text() for path in checkpoints)
    assert undisturbed == killed


def losses(files: Iterator[str]) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for text in files for row in map(json.loads, text.splitlines())]
