"""Latents of flipped images, through the real stages with an autoencoder that tells left from right."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from counting_models import TOWERS, CountingAutoencoder, count_models
from data_chain import encode_all
from PIL import Image
from safetensors.torch import load as load_tensors

from sd3core.captions.said import Said
from sd3core.data.encoded_shards import FLIPPED_TENSOR, LATENT_TENSOR
from sd3core.data.manifest import read_manifest
from sd3core.data.shards import read_samples, read_shard_index
from sd3core.data.store import open_store
from sd3core.flip_rule import READABLE, SIDES
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.encode_latents import FLIPPED, NOT_FLIPPED
from workers.ingest import ingest_stage

IMAGES = 40


@pytest.fixture
def folder(tmp_path):
    """Pictures that are darker on their left; each fourth caption says a side."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(IMAGES):
        pixels = np.zeros((48, 48, 3), dtype=np.uint8)
        pixels[:, 24:] = 100 + number
        Image.fromarray(pixels).save(images / f"{number:02d}.png")
        (images / f"{number:02d}.txt").write_text(f"picture {'x' * number} {'left' if number % 4 == 0 else 'plain'}")
    return images


@pytest.fixture
def seen(monkeypatch, tmp_path):
    return count_models(monkeypatch, tmp_path)


def encode(folder, store, *overrides: str, mirrored: bool = False):
    """The stages up to the latents. `mirrored`: the pictures' corners are in the half that differs."""
    if mirrored:
        for path in folder.glob("*.png"):
            Image.fromarray(np.asarray(Image.open(path))[:, ::-1]).save(path)
    settings = ["data.source=folder", f"data.folder={folder}", "data.held_out_fraction=0.25", "compute.actors=1"]
    recipe = load_recipe("tiny-test", [*settings, "caption.captioner=none", *overrides])
    raw = ingest_stage(recipe, store, ignore_progress)
    captions = None
    if recipe.caption.captioner != "none":
        captions = caption_stage(recipe, store, raw.manifest, ignore_progress).manifest
    parts = encode_all(recipe, store, raw.manifest, captions, TOWERS)
    made = parts["latents.pretrain"]
    return SimpleNamespace(made=made, rows=rows_of(store, made), captions=captions, parts=parts)


def rows_of(store, made) -> dict[str, tuple[dict, dict[str, torch.Tensor]]]:
    """Key -> (row of the index, tensors of the file)."""
    found, manifest = {}, read_manifest(store, made.manifest.folder, made.manifest.digest)
    for shard in manifest.shards:
        tar = dict(read_samples(store.get(f"{manifest.folder}/{shard.stem}.tar")))
        for row in read_shard_index(store, manifest.folder, shard.stem).to_pylist():
            found[row["key"]] = row, load_tensors(tar[row["key"]]["safetensors"])
    return found


def says_left(key: str) -> bool:
    return int(key[:2]) % 4 == 0


def test_images_that_train_and_may_be_flipped_have_both_latents(folder, seen, tmp_path):
    store = open_store(str(tmp_path / "store"))
    plain, flipped = encode(folder, store), encode(folder, store, "encode.flip=true")
    assert plain.made.manifest.folder != flipped.made.manifest.folder
    for key, (row, tensors) in flipped.rows.items():
        wanted = row["split"] == "train" and not says_left(key)
        assert row["flipped"] == wanted and (FLIPPED_TENSOR in tensors) == wanted
        before_row, before = plain.rows[key]
        assert "flipped" not in before_row and before.keys() == {LATENT_TENSOR}
        torch.testing.assert_close(tensors[LATENT_TENSOR], before[LATENT_TENSOR])
    trained = [key for key, (row, _) in flipped.rows.items() if row["split"] == "train"]
    counts = read_manifest(store, flipped.made.manifest.folder, flipped.made.manifest.digest).buckets
    kept = sum(map(says_left, trained))
    assert 0 < kept < len(trained) < IMAGES
    assert (counts[FLIPPED], counts[NOT_FLIPPED + SIDES]) == (len(trained) - kept, kept)
    [told] = [warning for warning in flipped.made.warnings if "flipped" in warning]
    assert told == (
        f"pretrain: {len(trained) - kept} of {len(trained)} training images flipped in half of their steps; not for what their"
        f" captions say: {kept} left or right"
    )
    assert not [warning for warning in plain.made.warnings if "flipped" in warning]


def test_a_caption_that_comes_to_say_a_side_takes_its_images_flipped_latent_back(folder, seen, tmp_path):
    store = open_store(str(tmp_path / "store"))
    before = encode(folder, store, "encode.flip=true")
    key = next(key for key, (row, _) in before.rows.items() if row["flipped"])
    (folder / f"{key[:2]}.txt").write_text("now with a cat on the right")
    after = encode(folder, store, "encode.flip=true")
    assert after.rows.keys() == before.rows.keys()
    assert {name for name in after.rows if after.rows[name][0]["flipped"] != before.rows[name][0]["flipped"]} == {key}
    assert FLIPPED_TENSOR not in after.rows[key][1]
    assert all(after.rows[name][0]["sha256"] == before.rows[name][0]["sha256"] for name in after.rows.keys() - {key})


def test_a_synthetic_caption_counts_too_in_every_phase(folder, seen, tmp_path):
    """One of an image that no caption of its own keeps; the shard is made of the captions too, and follows them."""
    store = open_store(str(tmp_path / "store"))
    captioner = ["caption.captioner=vision_language_model", "caption.model=/models/x", "encode.flip=true"]
    says_sign = lambda key: int(key[:2]) % 5 == 1
    words = lambda shade: "".join(chr(ord("a") + int(digit)) for digit in str(shade))  # a digit is something to read
    seen.say = lambda colour: Said(f"a {'sign' if (colour[0] - 100) % 5 == 1 else 'wall'} of tone {words(colour[0])}")
    made = encode(folder, store, *captioner, "finetune.0.min_scale=0", mirrored=True)
    for part in ("latents.pretrain", "latents.finetune.0"):
        rows = rows_of(store, made.parts[part])
        for key, (row, _) in rows.items():
            assert row["flipped"] == (row["split"] == "train" and not says_left(key) and not says_sign(key))
        manifest = read_manifest(store, made.parts[part].manifest.folder, made.parts[part].manifest.digest)
        assert manifest.inputs["captions"] == made.captions.digest
        assert manifest.buckets[NOT_FLIPPED + READABLE] > 0


def test_the_flipped_latent_is_that_of_the_flipped_image(folder, seen, tmp_path, monkeypatch):
    """By an autoencoder whose first channel is the mean of the left half, and the second of the right one: a flipped latent
    would have them as they were.
    """

    def halves(self, images: torch.Tensor) -> torch.Tensor:
        latent = torch.zeros(len(images), 16, images.shape[2] // 8, images.shape[3] // 8)
        for channel, part in enumerate(images.chunk(2, dim=3)):
            latent[:, channel] = part.mean(dim=(1, 2, 3))[:, None, None]
        return latent

    monkeypatch.setattr(CountingAutoencoder, "encode", halves)
    rows = encode(folder, open_store(str(tmp_path / "store")), "encode.flip=true").rows
    flipped = [tensors for row, tensors in rows.values() if row["flipped"]]
    assert len(flipped) > 10
    for tensors in flipped:
        latent, other = tensors[LATENT_TENSOR], tensors[FLIPPED_TENSOR]
        assert latent[0, 0, 0] < latent[1, 0, 0]  # darker on the left
        torch.testing.assert_close(other[:2], latent[:2].flip(0))
