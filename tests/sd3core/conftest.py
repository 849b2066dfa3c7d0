from __future__ import annotations

from pathlib import Path

import pytest
from small_towers import TINY, drawings


@pytest.fixture(scope="session")
def towers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five tiny towers in one local folder, as fetch_towers gives it."""
    from sd3core.towers.artifact import TOWER_FOLDERS
    from sd3core.towers.training.make import make_small_tower

    folder = tmp_path_factory.mktemp("towers")
    pictures, captions = drawings(16)
    for name in TOWER_FOLDERS:
        make_small_tower(name, TINY, pictures, captions, 0, folder)
    return folder
