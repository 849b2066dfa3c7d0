"""Positions against the paper's formula, the released table and the goldens computed from it."""

import numpy as np
import pytest
import torch

from sd3core.errors import DataError
from sd3core.mmdit.positions import coordinates_of_row, crop_positions, grid_coordinates, position_table


def test_the_released_grid():
    assert np.array_equal(grid_coordinates(16, 64, 192), np.arange(192) / 4 - 16)


def test_pretraining_squares_count_from_zero_and_finer_grids_span_the_same():
    assert np.array_equal(grid_coordinates(16, 16, 16), np.arange(16))
    assert np.array_equal(grid_coordinates(16, 32, 32), np.arange(32) / 2)
    assert np.array_equal(grid_coordinates(4, 4, 16)[6:10], np.arange(4))


def test_golden_values_of_the_released_table():
    table = position_table(grid_coordinates(16, 64, 192), 1536)
    assert table.shape == (1, 36864, 1536) and table.dtype == torch.float32
    code = table[0, 70 * 192 + 90]
    torch.testing.assert_close(code[[0, 384, 768]], torch.tensor([0.2151200, 0.9765876, 0.9974950]), atol=1e-6, rtol=0)


def test_crop_takes_the_centre_with_a_floored_margin():
    table = torch.arange(64, dtype=torch.float32).view(1, 64, 1)  # 8 x 8
    assert crop_positions(table, 8, 8).equal(table)
    assert crop_positions(table, 2, 4).flatten().tolist() == [26, 27, 28, 29, 34, 35, 36, 37]
    assert crop_positions(table, 3, 3)[0, 0].item() == 2 * 8 + 2
    with pytest.raises(DataError, match="9 x 2 patches"):
        crop_positions(table, 9, 2)


def test_embedding_then_cropping_is_cropping_then_embedding():
    coordinates = grid_coordinates(4, 8, 12)
    cropped = crop_positions(position_table(coordinates, 64), 8, 8)
    assert cropped.equal(position_table(coordinates[2:10], 64))


@pytest.mark.parametrize("sizes", [(16, 64, 192), (16, 16, 48), (4, 8, 16), (64, 192, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_coordinates_are_read_back_from_a_table(sizes, dtype):
    coordinates = grid_coordinates(*sizes)
    first_row = position_table(coordinates, 192)[0, : len(coordinates), :96]
    read = coordinates_of_row(first_row.to(dtype))
    assert np.abs(read - coordinates).max() < (1e-5 if dtype == torch.float32 else 2e-3)
