from __future__ import annotations

import pytest

from sd3core.recipe import Compute
from workers.ray_session import start_ray


@pytest.fixture(scope="module")
def local_ray():
    """One Ray for the tests of a file: the stages use it as they find it."""
    with start_ray(Compute(object_store_mb=80)):
        yield
