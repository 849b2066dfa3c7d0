"""Scenes through the demo's autoencoder: what the detector reads afterwards bounds a model's score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scene_pictures import at_64, kinds

from sd3core.autoencoder import Autoencoder
from sd3core.pictures import to_uint8
from sd3core.recipe_file import load_recipe
from sd3core.small_world.detector import detect
from sd3core.small_world.scenes import draw_scene, render
from sd3core.tower_training.vae import train_vae

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # training a VAE takes minutes of one core

TRAINING, SCENES = 1024, 256


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    settings, threads = load_recipe("mini").towers.small.vae, torch.get_num_threads()
    torch.set_num_threads(2)  # nothing else runs beside it
    try:
        vae, _ = train_vae(settings, [render(draw_scene(0, index)) for index in range(TRAINING)], seed=0)
    finally:
        torch.set_num_threads(threads)
    return Autoencoder(vae)


@pytest.mark.parametrize(("side", "resize"), [(64, at_64), (128, np.asarray)])
def test_right_on_scenes_that_were_encoded_and_decoded(autoencoder, side, resize):
    scenes = [draw_scene(201, index) for index in range(SCENES)]
    pictures = torch.from_numpy(np.stack([resize(render(scene)) for scene in scenes])).permute(0, 3, 1, 2)
    assert pictures.shape == (SCENES, 3, side, side)
    right = []
    for images, drawn in zip(pictures.split(32), np.array_split(np.array(scenes, dtype=object), SCENES // 32), strict=True):
        decoded = to_uint8(autoencoder.decode(autoencoder.encode(images.float() / 127.5 - 1)))
        right += [kinds(detect(image)) == kinds(scene.objects) for image, scene in zip(decoded, drawn, strict=True)]
    assert np.mean(right) >= 0.99
