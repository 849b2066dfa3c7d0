"""The detector is right on drawn scenes, sharp or reconstructed, at any size, and finds planted errors."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scene_pictures import PLANTED, at_64, kinds, planted, reconstructed, scene_of
from scipy import ndimage

from sd3core.small_world.detector import UNKNOWN, detect
from sd3core.small_world.scenes import draw_scene, render
from sd3core.small_world.world import COLOURS, SHAPES

SCENES = 200


def right_share(change, seed: int, **scene_options) -> float:
    scenes = [draw_scene(seed, index, **scene_options) for index in range(SCENES)]
    return np.mean(
        [kinds(detect(change(render(scene), index))) == kinds(scene.objects) for index, scene in enumerate(scenes)]
    )


def test_right_on_fresh_scenes_at_64_px():
    assert right_share(lambda picture, _: at_64(picture), seed=101) >= 0.99


def test_right_on_fresh_scenes_at_128_px():
    assert right_share(lambda picture, _: picture, seed=102) >= 0.99


@pytest.mark.parametrize("aspect", [9 / 16, 0.75, 4 / 3, 16 / 9])
def test_right_on_other_aspects(aspect):
    assert right_share(lambda picture, _: at_64(picture), seed=103, aspect=aspect) >= 0.99


def test_right_at_48_and_at_320_px():
    def small(picture, _):
        return np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.LANCZOS))

    assert right_share(small, seed=104) >= 0.99
    for index in range(20):
        scene = draw_scene(105, index, side_px=320, aspect=4 / 3)
        found = detect(render(scene))
        assert kinds(found) == kinds(scene.objects)
        for item in scene.objects:  # in pixels of the picture given
            nearest = min(found, key=lambda other: np.hypot(*np.subtract(other.centre, item.centre)))
            assert (
                np.hypot(*np.subtract(nearest.centre, item.centre)) < 3
                and abs(nearest.size - item.size) < 0.1 * item.size
            )


@pytest.mark.parametrize(("blur", "noise"), [(0.7, 4.0), (1.0, 6.0)])
def test_right_on_reconstructed_scenes(blur, noise):
    assert right_share(lambda picture, index: reconstructed(at_64(picture), index, blur, noise), seed=106) >= 0.99
    assert right_share(lambda picture, index: reconstructed(picture, index, blur, noise), seed=107) >= 0.99


def test_words_are_not_seen():
    assert right_share(lambda picture, _: at_64(picture), seed=108, words=1.0) >= 0.98


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error):
    """And the other objects are read as before: no alarm elsewhere stands for it."""
    right = []
    for index in range(120):
        picture, before, others = planted(error, index)
        found = kinds(detect(reconstructed(at_64(picture), index, 0.7, 4.0)))
        right.append(found != before and found >= others)
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("side", [64, 128])
def test_specks_are_no_objects_and_more_than_a_speck_is(side):
    """An object's smallest area is 0.3 % of the square; from there to 1.2 % it is no whole one."""
    found = []
    for share in (0.002, 0.005):
        picture = np.full((side, side, 3), 190, np.uint8)
        width = round((share * side**2) ** 0.5)
        picture[10 : 10 + width, 10 : 10 + width] = COLOURS["red"]
        found.append([item.shape for item in detect(picture)])
    assert found == [[], [UNKNOWN]]


def test_noise_is_no_object():
    for index in range(25):
        rng = np.random.default_rng(index)
        grain = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        cells = np.asarray(
            Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC)
        )
        clouds = np.clip(ndimage.gaussian_filter(rng.normal(0, 1, (64, 64, 3)), (4, 4, 0)) * 900 + 128, 0, 255).astype(
            np.uint8
        )
        for picture in (grain, cells, clouds):
            found = detect(picture)
            assert not found or any(UNKNOWN in (item.shape, item.colour) for item in found)


@pytest.mark.parametrize("grey", [0, 64, 128, 255])
def test_an_empty_picture_has_no_object(grey):
    assert detect(np.full((64, 64, 3), grey, np.uint8)) == []


@pytest.mark.parametrize("colour", list(COLOURS))
def test_shapes_drawn_by_another_renderer(colour):
    """Pillow's polygons instead of our distances: the classes do not hang on one renderer."""
    image = Image.new("RGB", (512, 512), (210, 208, 204))
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 180, 180), fill=COLOURS[colour])
    draw.rectangle((300, 50, 440, 190), fill=COLOURS[colour])
    draw.polygon([(110, 290), (40, 430), (180, 430)], fill=COLOURS[colour])
    draw.rectangle((290, 330, 450, 394), fill=COLOURS[colour])
    found = detect(at_64(np.asarray(image)))
    assert kinds(found) == Counter({(shape, colour): 1 for shape in SHAPES})


def test_foreign_shapes_and_colours_are_unknown():
    image = Image.new("RGB", (512, 512), (210, 208, 204))
    draw = ImageDraw.Draw(image)
    draw.polygon([(40, 40), (180, 40), (110, 180)], fill=COLOURS["red"])  # apex down
    draw.ellipse((300, 40, 460, 200), fill=COLOURS["blue"])
    draw.ellipse((345, 85, 415, 155), fill=(210, 208, 204))  # a ring
    draw.rectangle((80, 300, 150, 440), fill=COLOURS["green"])  # twice as high as wide
    draw.pieslice((300, 300, 460, 460), 180, 360, fill=COLOURS["purple"])
    assert [item.shape for item in detect(at_64(np.asarray(image)))] == [UNKNOWN] * 4


def test_touching_shapes_of_one_colour_are_no_two_shapes():
    picture = at_64(render(scene_of(("circle", "red", 20, 32, 22), ("circle", "red", 40, 32, 22))))
    assert [item.shape for item in detect(picture)] == [UNKNOWN]


def test_pictures_it_cannot_read_are_errors():
    with pytest.raises(ValueError, match="at least 48"):
        detect(np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        detect(np.zeros((64, 64, 3)))
