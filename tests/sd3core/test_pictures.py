import io

import numpy as np
import pytest
import torch
from PIL import Image

from sd3core.pictures import (
    encode_png,
    make_grid,
    read_settings,
    thumbnail_jpeg,
    to_uint8,
)


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(values).shape == (1, 1, 5, 3)


def test_grid_places_pictures_row_by_row():
    images = [np.full((4, 6, 3), value, np.uint8) for value in (1, 2, 3)]
    grid = make_grid(images, columns=2, gap=1)
    assert grid.shape == (9, 13, 3)
    assert (grid[:4, :6] == 1).all() and (grid[:4, 7:] == 2).all() and (grid[5:, :6] == 3).all()
    assert (grid[4] == 255).all() and (grid[5:, 7:] == 255).all()
    with pytest.raises(ValueError):
        make_grid([], columns=2)


def test_png_keeps_pixels_and_settings():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    settings = {"prompt": "ein grüner Kreis ○\nüber zwei Zeilen", "seed": 7}
    data = encode_png(image, settings)
    assert (np.asarray(Image.open(io.BytesIO(data))) == image).all()
    assert read_settings(data) == {"prompt": settings["prompt"], "seed": "7"}
    assert data == encode_png(image, settings)


def test_thumbnail_is_small():
    image = np.zeros((600, 1200, 3), np.uint8)
    data = thumbnail_jpeg(image, max_side=300)
    assert Image.open(io.BytesIO(data)).size == (300, 150) and len(data) < 10_000
