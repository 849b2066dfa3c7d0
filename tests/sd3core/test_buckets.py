from __future__ import annotations

import ast
import importlib.util
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from sd3core.buckets import (
    MERGED_CROP,
    bucket_name,
    bucket_sides,
    buckets_for_area,
    cut_off,
    merged_buckets,
    nearest_bucket,
    nearest_places,
    off_centre,
)
from sd3core.mmdit.positions import crop_positions
from sd3core.recipe import Buckets, Training
from sd3core.recipe_file import load_recipe

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


SDXL = """512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344
768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024"""  # and transposes; sd3-facts 9.4


def test_the_rule_gives_sdxls_list():
    wide = {tuple(int(side) for side in name.split("x")) for name in SDXL.split()}
    found = buckets_for_area(1024)
    assert len(found) == len(set(found)) == 41
    assert set(found) == wide | {(width, height) for height, width in wide}
    assert found == sorted(found, key=lambda side: (-side[0], side[1]))


@pytest.mark.parametrize("side_px", [512, 1024])
def test_the_rule_gives_every_size_of_pixarts_lists(side_px):
    """As diffusers has them; read from the source, for its import takes seconds."""
    module = importlib.util.find_spec("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    nodes = ast.parse(Path(module.origin).read_text()).body
    [bins] = [
        ast.literal_eval(node.value)
        for node in nodes
        if isinstance(node, ast.Assign) and node.targets[0].id == f"ASPECT_RATIO_{side_px}_BIN"
    ]
    assert len(bins) > 30
    assert {(int(height), int(width)) for height, width in bins.values()} <= set(buckets_for_area(side_px))


@pytest.mark.parametrize(("side_px", "step"), [(96, 16), (256, 16), (512, 32), (768, 48), (1024, 64), (1440, 80)])
@pytest.mark.parametrize("max_ratio", [1.0, 2.0, 4.0])
def test_any_area(side_px, step, max_ratio):
    sides = buckets_for_area(side_px, max_ratio=max_ratio)
    assert (side_px, side_px) in sides and sides == buckets_for_area(side_px, step, max_ratio)
    assert all((width, height) in sides for height, width in sides)
    for height, width in sides:
        assert height % step == 0 == width % step
        assert 0.9 <= height * width / side_px**2 <= 1 and 1 / max_ratio <= height / width <= max_ratio
    assert len(sides) > 1 if max_ratio > 1 else sides == [(side_px, side_px)]


def test_a_phase_has_its_buckets_by_ratios_or_by_the_rule():
    sizes = {"side_px": 512, "samples": 8, "global_batch": 1, "micro_batch": 1, "checkpoint_every_samples": 8}
    assert Training(**sizes, aspect_ratios=(1.0, 4.0)).bucket_sides() == [(512, 512), (256, 1024)]
    assert Training(**sizes, buckets=Buckets()).bucket_sides() == buckets_for_area(512)
    own = Buckets(multiple_px=64, max_ratio=2.0, min_area=0.8)
    assert Training(**sizes, buckets=own).bucket_sides() == buckets_for_area(512, 64, 2.0, 0.8)


def test_nearest_is_symmetric_in_the_logarithm():
    sides = [(128, 128), (112, 144), (144, 112)]
    assert nearest_bucket(500, 500, sides) == (128, 128)
    assert nearest_bucket(1600, 900, sides) == (112, 144) and nearest_bucket(900, 1600, sides) == (144, 112)
    edge = math.sqrt(144 / 112)  # halfway to the wider one
    assert nearest_bucket(int(1e6 * edge) + 10, 10**6, sides) == (112, 144)
    assert nearest_bucket(int(1e6 * edge) - 10, 10**6, sides) == (128, 128)
    assert bucket_name((112, 144)) == "112x144"


def test_sizes_whose_patches_lie_half_a_patch_off_are_found():
    """Against the crop itself: the middle of the grid that is cut out, beside the middle of the table."""
    table = torch.arange(16.0)[:, None].expand(16, 16).reshape(1, 256, 1)
    sides = [(16 * h, 16 * w) for h in range(1, 9) for w in range(1, 9)]
    off = [
        (h, w)
        for h, w in sides
        if {
            crop_positions(z, h // 16, w // 16).mean().item()
            for z in (table, table.view(1, 16, 16, 1).transpose(1, 2).reshape(1, 256, 1))
        }
        != {7.5}
    ]
    assert off_centre(sides, 256) == off and off_centre([(80, 80), (64, 96)], 256) == [(80, 80)]
    assert off_centre([(80, 80), (64, 96)], 272) == [(64, 96)]
    for name in ("mini", "small", "sd3-2b", "sd3-8b"):
        recipe = load_recipe(name)
        assert not any(off_centre(phase.bucket_sides(), recipe.model.max_side_px) for _, phase in recipe.phases())


def test_many_sizes_are_placed_as_each_alone():
    rng = np.random.default_rng(0)
    for sides in (buckets_for_area(1024), buckets_for_area(256, 16, max_ratio=2.0), bucket_sides(64, (1.0, 2.0, 0.5))):
        between = [
            (a[1] * b[1], a[0] * b[0]) for a in sides for b in sides
        ]  # squared: half of them in the middle of two
        sizes = np.array(
            [*rng.integers(1, 3000, (2_000, 2)).tolist(), *between, *(side[::-1] for side in sides), (7, 7)]
        )
        expected = [sides.index(nearest_bucket(width, height, sides)) for width, height in sizes.tolist()]
        assert nearest_places(sizes, sides).tolist() == expected


def test_small_buckets_join_the_nearest_that_fills_a_batch():
    square, wide, wider, tall = (256, 256), (240, 256), (224, 256), (256, 128)
    assert cut_off(square, wide) == pytest.approx(1 - 240 / 256) == cut_off(wide, square)
    # the others lie farther than a tenth
    assert merged_buckets({square: 10, wide: 3, wider: 2, tall: 1}, 8) == {wide: square}
    assert merged_buckets({square: 10, wide: 8, wider: 2, tall: 1}, 8) == {wider: wide}
    assert merged_buckets({square: 10, wide: 0, wider: 9}, 8) == {}
    # equally far from both: the smaller side, whatever comes first
    assert merged_buckets({(256, 240): 9, square: 1, wide: 9}, 8) == merged_buckets(
        {wide: 9, square: 1, (256, 240): 9}, 8
    )
    # none fills a batch: the fullest is taken for one
    assert merged_buckets({square: 3, wide: 4, tall: 2}, 8) == {square: wide}
    assert merged_buckets({}, 8) == {}


def test_merging_cuts_no_image_by_more_than_is_stated():
    """By the definition: the share of an image of aspect a that fills a bucket of aspect b is min(a / b, b / a)."""

    def kept(aspect: float, side: tuple[int, int]) -> float:
        return min(aspect * side[0] / side[1], side[1] / side[0] / aspect)

    sides = buckets_for_area(1024)
    for hundredth in range(25, 400):
        own = nearest_bucket(hundredth, 100, sides)
        merged = merged_buckets({side: 1 if side == own else 4096 for side in sides}, 4096)
        if own in merged:
            aspect = hundredth / 100
            assert kept(aspect, own) - kept(aspect, merged[own]) <= cut_off(own, merged[own]) + 1e-9
            assert cut_off(own, merged[own]) <= MERGED_CROP
    assert all(
        merged_buckets({side: 1, other: 4096}, 4096) in ({}, {side: other})
        for side in sides
        for other in sides
        if side != other
    )


def test_a_row_more_moves_its_own_bucket_and_its_small_neighbours_alone():
    sides, rng = buckets_for_area(1024), random.Random(0)
    for _ in range(300):
        rows = {side: rng.choice([0, 1, 5, 7, 8, 30]) for side in sides}
        rows[(1024, 1024)] = 100
        grown = rng.choice(sides)
        before, after = merged_buckets(rows, 8), merged_buckets(rows | {grown: rows[grown] + 1}, 8)
        assert (1024, 1024) not in before
        changed = {side for side in before | after if before.get(side) != after.get(side)}
        if rows[grown] != 7:
            assert changed <= {grown}  # one with no images before
        assert all(side == grown or after.get(side) == grown for side in changed)
