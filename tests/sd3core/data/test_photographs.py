"""The photographs are real files of several sizes, each with a caption of one sentence."""

from __future__ import annotations

import pytest
from PIL import Image

from sd3core.data import photographs
from sd3core.errors import DataError


def test_writes_pictures_with_captions(tmp_path):
    paths = photographs.write_photographs(tmp_path / "photographs")
    assert len(paths) >= 10 and len({path.stem for path in paths}) == len(paths)
    sizes = set()
    for path in paths:
        with Image.open(path) as image:
            image.load()
            sizes.add(image.size)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        assert caption.strip().endswith(".") and caption.count(".") == 1 and len(caption.split()) >= 6
    assert any(width > height for width, height in sizes) and any(width < height for width, height in sizes)
    assert any(width == height for width, height in sizes) and min(min(size) for size in sizes) >= 256
    assert sorted(path.suffix for path in (tmp_path / "photographs").iterdir()).count(".txt") == len(paths)


def test_a_missing_file_names_the_mend(tmp_path, monkeypatch):
    monkeypatch.setitem(photographs.PHOTOGRAPHS, "cat", ("skimage/data", "no-such-cat.png", "A cat."))
    with pytest.raises(DataError, match="pip install .*scikit-image"):
        photographs.write_photographs(tmp_path)


def test_a_missing_package_names_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        photographs.write_photographs(tmp_path)
