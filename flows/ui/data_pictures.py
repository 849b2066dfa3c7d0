"""Draws some of the images, and what the autoencoder makes of them."""

from __future__ import annotations

import numpy as np

from flows.ui.previews import COLUMNS, shown_rows
from sd3core.data.images import PixelRules, to_model_range
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.split_rows import read_row_images
from sd3core.data.store import Store
from sd3core.pictures import make_grid, page_jpeg, to_uint8
from sd3core.recipe import Recipe
from sd3core.towers.artifact import fetch_towers
from workers.caches import checked_here, towers_cache

LARGEST_PX = 256


def image_pictures(recipe: Recipe, store: Store, raw: ManifestRef) -> dict[str, bytes]:
    """Caption -> JPEG."""
    images = _some_images(recipe, store, raw)
    if not len(images):
        return {}
    return {"some of the images, as training's square crops": page_jpeg(make_grid(list(images), COLUMNS))}


def autoencoder_pictures(recipe: Recipe, store: Store, raw: ManifestRef, towers: ManifestRef) -> dict[str, bytes]:
    """Caption -> JPEG. Images of the held-out part were not there to learn from."""
    from sd3core.towers.autoencoder import load_autoencoder  # loads diffusers, which a finished stage does not need

    images = _some_images(recipe, store, raw)[:COLUMNS]
    if not len(images):
        return {}
    autoencoder = load_autoencoder(fetch_towers(store, towers.folder, towers_cache(), only=("vae",)))
    decoded = to_uint8(autoencoder.decode(autoencoder.encode(to_model_range(images))))
    return {
        "images, and below them what their latents decode to": page_jpeg(make_grid([*images, *decoded], len(images)))
    }


def _some_images(recipe: Recipe, store: Store, raw: ManifestRef) -> np.ndarray:
    """(n, side, side, 3) uint8."""
    manifest = read_manifest(store, raw.folder, raw.digest)
    side = min(recipe.phases()[-1][1].side_px, LARGEST_PX)
    rows = shown_rows(recipe, store, manifest)
    return read_row_images(store, manifest, rows, side, PixelRules.of(recipe.data), checked_here())
