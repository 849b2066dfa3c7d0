from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_towers import TINY, drawings

from sd3core.errors import DataError
from sd3core.towers.autoencoder import load_autoencoder
from sd3core.towers.training.vae import _middles, _resize, build_vae, normalise_latents


def test_shapes_and_the_inverse_of_the_normalisation(towers_folder: Path):
    autoencoder = load_autoencoder(towers_folder)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latent = autoencoder.encode(images)
    assert latent.shape == (2, 16, 4, 6)
    z = latent / autoencoder.scale + autoencoder.shift
    assert torch.allclose(z, autoencoder.module.encode(images).latent_dist.mean, atol=1e-5)
    decoded = autoencoder.decode(latent)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert torch.allclose(decoded, autoencoder.module.decode(z).sample.clamp(-1, 1), atol=1e-5)
    assert torch.equal(autoencoder.encode(images), latent)  # the mean, no draw


def test_normalised_latents_have_mean_0_and_std_1(towers_folder: Path):
    pictures, _ = drawings(16)
    side = TINY.vae.crop_px
    images = _middles([_resize(picture, side) for picture in pictures], side)
    vae = build_vae(TINY.vae)
    figures = normalise_latents(vae, images)
    z = vae.encode(images).latent_dist.mean
    latent = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert abs(latent.mean()) < 1e-4 and abs(latent.std() - 1) < 1e-4
    assert figures["latent_scale"] == vae.config.scaling_factor


def test_the_config_is_that_of_the_released_autoencoder(towers_folder: Path):
    config = json.loads((towers_folder / "vae" / "config.json").read_text())
    assert config["use_quant_conv"] is False and config["use_post_quant_conv"] is False
    assert config["latent_channels"] == 16 and len(config["block_out_channels"]) == 4


def test_sides_that_do_not_fit_are_refused(towers_folder: Path):
    with pytest.raises(ValueError, match="multiples of 8"):
        load_autoencoder(towers_folder).encode(torch.zeros(1, 3, 30, 32))


@pytest.mark.parametrize(("key", "value"), [("scaling_factor", None), ("block_out_channels", [8, 8])])
def test_a_config_that_cannot_be_used_is_named(towers_folder: Path, tmp_path: Path, key: str, value: object):
    shutil.copytree(towers_folder / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=key):
        load_autoencoder(tmp_path)


def test_nothing_there_is_a_data_error(tmp_path: Path):
    with pytest.raises(DataError, match="config.json: missing"):
        load_autoencoder(tmp_path)


def test_pictures_keep_their_proportions():
    assert _resize(np.zeros((50, 100, 3), np.uint8), 32).shape == (32, 64, 3)
