"""Positions of patches: sine-cosine codes that resolution only makes denser.

Paper 5.3.2.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from sd3core.errors import DataError


def grid_coordinates(position_base: int, position_side: int, position_max: int) -> np.ndarray:
    """Coordinate of patch p along one axis: (p - (max - side) / 2) * base / side, p = 0 .. max - 1. Paper 5.3.2.

    All three are counted in patches. The central `position_side` patches span [0, position_base), the coordinates of
    the square that pretraining saw; wider and taller pictures reach below 0 and above position_base. Returns (max,)
    float64.
    """
    p = np.arange(position_max, dtype=np.float64)
    return (p - (position_max - position_side) / 2) * position_base / position_side


def sine_cosine(coordinates: np.ndarray, channels: int) -> np.ndarray:
    """[sin(x w_k) | cos(x w_k)] with w_k = 10000^(-k / (channels / 2)). coordinates (N,) -> (N, channels) float64."""
    frequencies = 10000.0 ** (-np.arange(channels // 2, dtype=np.float64) / (channels // 2))
    angles = np.outer(coordinates, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def position_table(coordinates: np.ndarray, hidden_size: int) -> Tensor:
    """The code of every patch of a square grid: first half of the channels the column, second half the row.

    coordinates (max,) -> (1, max * max, hidden_size) float32, rows major, as the released checkpoints store it.
    """
    codes = torch.from_numpy(sine_cosine(coordinates, hidden_size // 2)).float()  # (max, H/2)
    side = len(codes)
    columns = codes.unsqueeze(0).expand(side, side, -1)
    rows = codes.unsqueeze(1).expand(side, side, -1)
    return rearrange(torch.cat([columns, rows], dim=-1), "h w d -> 1 (h w) d")


def crop_positions(table: Tensor, height: int, width: int) -> Tensor:
    """The centre of the table for a grid of height x width patches. (1, max * max, H) -> (1, height * width, H).

    The margin is floored, so a grid of odd height or width lies half a patch off the centre, as in the released
    checkpoints and in diffusers, which draw from ours too. The shipped recipes have even grids only.
    Raises DataError when the grid is larger than the table.
    """
    side = round(table.shape[1] ** 0.5)
    if height > side or width > side:
        raise DataError(
            f"a latent of {height} x {width} patches is larger than the position table ({side} x {side}):"
            f" raise model.max_side_px to {16 * max(height, width)} or take smaller pictures"
        )
    top, left = (side - height) // 2, (side - width) // 2
    grid = rearrange(table, "1 (h w) d -> 1 h w d", h=side)[:, top : top + height, left : left + width]
    return rearrange(grid, "1 h w d -> 1 (h w) d")


def coordinates_of_row(codes: Tensor) -> np.ndarray:
    """The coordinates that a stored row of column codes stands for: the inverse of `sine_cosine`.

    codes (max, H/2), in any float dtype -> (max,) float64. The slowest frequencies give the value, the fastest the digits.
    """
    codes = codes.double().numpy()
    count = codes.shape[1] // 2
    frequencies = 10000.0 ** (-np.arange(count, dtype=np.float64) / count)
    angles = np.arctan2(codes[:, :count], codes[:, count:])  # (max, H/4), known up to a turn
    coordinates = angles[:, -1] / frequencies[-1]
    for k in reversed(range(count - 1)):  # each faster frequency refines the value by less than half of its period
        turns = np.round((coordinates * frequencies[k] - angles[:, k]) / (2 * np.pi))
        coordinates = (angles[:, k] + 2 * np.pi * turns) / frequencies[k]
    return coordinates
