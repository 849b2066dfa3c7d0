"""The two kinds of store that every contract test runs on."""

from __future__ import annotations

import pytest

from sd3core.data.store import open_store


@pytest.fixture(params=["file", "s3"])
def store(request, tmp_path):
    if request.param == "file":
        return open_store(f"file://{tmp_path}/store")
    return open_store(f"s3://{request.getfixturevalue('s3_bucket')}/a/prefix")


@pytest.fixture
def file_store(tmp_path):
    return open_store(str(tmp_path / "store"))
