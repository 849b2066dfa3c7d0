"""What the small towers' trainings share: the rate's course, rows held apart.

The rows held apart give the figures that a training ends with.
"""

from __future__ import annotations

import math

import numpy as np


def ramp_and_fade(step: int, steps: int, ramp: float = 0.05) -> float:
    """Factor on the learning rate: linear from 0 to 1 over the first `ramp` of the steps, then half a cosine towards 0."""
    done = (step + 1) / steps
    if done < ramp:
        return done / ramp
    return 0.5 * (1.0 + math.cos(math.pi * (done - ramp) / (1.0 - ramp)))


def split_held_apart(rows: int, fraction: float = 1 / 16, at_most: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows to measure on), both increasing and neither empty; a single row serves for both."""
    held = min(at_most, max(1, int(rows * fraction)))
    if rows == 1:
        return np.array([0]), np.array([0])
    order = np.arange(rows)
    measured = np.linspace(0, rows - 1, held, dtype=int)
    return np.setdiff1d(order, measured), measured
