from __future__ import annotations

import os
import shutil
import tempfile

import pytest

# Prefect reads its settings when it is imported: the tests keep off the user's profile and send nothing.
_PREFECT_HOME = tempfile.mkdtemp(prefix="sd3-test-prefect-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share the cores: threads of torch's would wait for each other
os.environ.update(PREFECT_HOME=_PREFECT_HOME, PREFECT_SERVER_ANALYTICS_ENABLED="false", DO_NOT_TRACK="1")


def pytest_unconfigure() -> None:
    shutil.rmtree(_PREFECT_HOME, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What two test processes share out (`--dist loadgroup`): files, and the tests of whole chains, which share their services, in one."""
    for item in items:
        file = item.path.relative_to(item.config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group("end_to_end" if file.startswith("tests/end_to_end/") else file))
