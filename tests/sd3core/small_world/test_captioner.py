"""Captions from pixels name every count, colour, shape and relation."""

from __future__ import annotations

import numpy as np
import pytest
from scene_pictures import at_64, scene_of

from sd3core.small_world.captioner import caption_from_pixels
from sd3core.small_world.scenes import draw_scene, render
from sd3core.small_world.world import NUMBERS


@pytest.mark.parametrize(
    ("objects", "captions"),
    [
        ([("circle", "red", 32, 32, 20)], {"a red circle"}),
        ([("bar", "blue", x, 32, 15) for x in (12, 32, 52)], {"three blue bars"}),
        (
            [("circle", "red", 16, 30, 18), ("square", "green", 46, 34, 18)],
            {"a red circle left of a green square", "a green square right of a red circle"},
        ),
        (
            [("triangle", "cyan", 32, 16, 18), ("triangle", "purple", 30, 46, 18)],
            {"a cyan triangle above a purple triangle", "a purple triangle below a cyan triangle"},
        ),
        (
            [("circle", "red", 18, 18, 18), ("square", "green", 46, 46, 18)],
            {"a red circle and a green square", "a green square and a red circle"},
        ),
        (
            [("circle", "red", 14, 14, 16), ("circle", "red", 44, 14, 16), ("square", "green", 30, 46, 16)],
            {"two red circles and a green square", "a green square and two red circles"},
        ),
        ([("square", "yellow", x, y, 12) for x in (10, 30, 50) for y in (12, 50)], {"many yellow squares"}),
        ([], {"an empty picture"}),
    ],
)
def test_captions(objects, captions):
    assert caption_from_pixels(render(scene_of(*objects))) in captions


def test_captions_are_complete_short_and_fixed():
    turned = set()
    for index in range(200):
        scene = draw_scene(31, index)
        picture = at_64(render(scene))
        caption = caption_from_pixels(picture)
        assert caption == caption_from_pixels(np.array(picture)) and len(caption.split()) <= 12
        assert all(item.colour in caption and item.shape in caption for item in scene.objects)
        if scene.task == "counting":
            assert caption.startswith(NUMBERS[len(scene.objects)])
        if scene.relation:
            assert "and" not in caption.split()
            turned.add(caption.startswith(f"a {scene.objects[0].colour} {scene.objects[0].shape}"))
    assert turned == {True, False}
