"""Scenes through the demo's autoencoder: what the detector reads afterwards bounds a model's score."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scene_pictures import PLANTED, at_64, kinds, planted

from sd3core.pictures import to_uint8
from sd3core.recipe_file import load_recipe
from sd3core.small_world.detector import detect
from sd3core.small_world.scenes import draw_scene, render
from sd3core.towers.autoencoder import Autoencoder
from sd3core.towers.training.vae import train_vae

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # training a VAE takes minutes of one core

TRAINING, SCENES = 1024, 256


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    settings, threads = load_recipe("mini").towers.small.vae, torch.get_num_threads()
    torch.set_num_threads(1)  # two would wait for each other while other tests hold the cores: ten times as long
    try:
        vae, _ = train_vae(settings, [render(draw_scene(0, index)) for index in range(TRAINING)], seed=0)
    finally:
        torch.set_num_threads(threads)
    return Autoencoder(vae)


def found_in(autoencoder: Autoencoder, pictures: list[np.ndarray]) -> list[Counter]:
    """What is detected in each picture, encoded and decoded."""
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    decoded = [image for part in images.split(32) for image in to_uint8(autoencoder.decode(autoencoder.encode(part)))]
    return [kinds(detect(image)) for image in decoded]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (80, 80), (64, 96), (96, 64)])
def test_right_on_scenes_that_were_encoded_and_decoded(autoencoder, height, width):
    """At the sizes that `mini` draws, and at those its autoencoder was trained on."""
    scenes = [draw_scene(201, index, aspect=width / height) for index in range(SCENES)]
    pictures = [
        np.asarray(Image.fromarray(render(s)).resize((width, height), Image.Resampling.LANCZOS)) for s in scenes
    ]
    found = found_in(autoencoder, pictures)
    assert np.mean([kinds(scene.objects) == there for scene, there in zip(scenes, found, strict=True)]) >= 0.99


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found_through_it(autoencoder, error):
    scenes = [planted(error, index, thin_bars=False) for index in range(SCENES)]
    found = found_in(autoencoder, [at_64(picture) for picture, _, _ in scenes])
    assert np.mean([there != before for there, (_, before, _) in zip(found, scenes, strict=True)]) >= 0.99
