"""The runs that sd3core/data/sources/README.md shows: the packages' photographs in a bucket, through a real Ray."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flows.cli.data_option import folder_overrides
from sd3core.data.manifest import read_manifest
from sd3core.data.sources.photograph_files import put_photographs
from sd3core.data.store import open_store
from sd3core.progress import Progress
from sd3core.recipe import Compute
from sd3core.recipe_file import load_recipe
from workers.ingest import ingest_stage
from workers.ray_session import start_ray

pytestmark = pytest.mark.slow
README = Path(__file__).resolve().parents[2] / "sd3core/data/sources/README.md"


def shown(kind: str) -> list[str]:
    """What the README's runs of this kind print of ingest, in their order."""
    printed = re.findall(r"^ingest +(.*)$", README.read_text(), re.MULTILINE)
    return [line for line in printed if line.startswith(kind)]


def test_tars_and_a_parquet_of_a_bucket_as_the_readme_shows_them(s3_bucket, tmp_path):
    store = open_store(str(tmp_path / "store"))
    progress: list[Progress] = []

    def ingest(url: str) -> str:
        recipe = load_recipe("tiny-test", [*folder_overrides(load_recipe("tiny-test"), url), "compute.actors=2"])
        result = ingest_stage(recipe, store, progress.append)
        assert not result.warnings
        assert read_manifest(store, result.manifest.folder).rows == result.rows
        return result.reason

    tars, parquet = f"s3://{s3_bucket}/photos", f"s3://{s3_bucket}/table"
    put_photographs(open_store(tars), "tars")
    put_photographs(open_store(parquet), "parquet")
    with start_ray(Compute(object_store_mb=80)):
        first = ingest(tars)
        assert progress[-1].unit == "MB" and progress[-1].note == "tar 2/2"
        again = ingest(tars)
        bucket = open_store(tars)
        for ending in (".tar", ".parquet", "_stats.json"):
            bucket.put(f"00002{ending}", bucket.get(f"00000{ending}"))
        added = ingest(tars)
        of_parquet = ingest(parquet)
    assert [first, added] == [line for line in shown("") if "tar" in line or line.startswith("first")][:2]
    assert again == "finished before, nothing to do" and again in shown("")
    assert of_parquet == shown("first run")[-1]
