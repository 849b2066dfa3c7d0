from __future__ import annotations

import math

import pytest

from sd3core.data.buckets import bucket_name, bucket_sides, nearest_bucket

RATIOS = (0.5, 0.5625, 0.75, 1.0, 1.3333, 1.7778, 2.0)


@pytest.mark.parametrize("side_px", [64, 128, 256, 512, 1024])
def test_sides_keep_the_area_and_the_patch(side_px):
    sides = bucket_sides(side_px, RATIOS)
    assert len(sides) == len(set(sides)) and (side_px, side_px) in sides
    for height, width in sides:
        assert height % 16 == 0 == width % 16
        assert abs(height * width / side_px**2 - 1) < 20 / side_px + 0.05  # within the rounding to 16 px


def test_known_sides():
    assert bucket_sides(128, (1.0, 0.75, 1.3333)) == [(128, 128), (144, 112), (112, 144)]
    assert bucket_sides(1024, (16 / 9,)) == [(768, 1360)]
    assert bucket_sides(16, (1.0, 4.0, 0.25)) == [(16, 16), (16, 32), (32, 16)]
    assert bucket_sides(64, (1.0, 1.01)) == [(64, 64)]  # equal ones stand once


def test_nearest_is_symmetric_in_the_logarithm():
    sides = [(128, 128), (112, 144), (144, 112)]
    assert nearest_bucket(500, 500, sides) == (128, 128)
    assert nearest_bucket(1600, 900, sides) == (112, 144) and nearest_bucket(900, 1600, sides) == (144, 112)
    edge = math.sqrt(144 / 112)  # halfway to the wider one
    assert nearest_bucket(int(1e6 * edge) + 10, 10**6, sides) == (112, 144)
    assert nearest_bucket(int(1e6 * edge) - 10, 10**6, sides) == (128, 128)
    assert bucket_name((112, 144)) == "112x144"
