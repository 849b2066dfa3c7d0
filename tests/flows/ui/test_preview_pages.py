"""Latents that the ranks wrote become a PNG with its settings inside and a page, by any autoencoder."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from flows.cli.terminal import _picture
from flows.ui.previews import PreviewDecoder
from sd3core.comparison_grid import READING
from sd3core.data.store import open_store
from sd3core.errors import StoreError
from sd3core.pictures import read_settings
from sd3core.shown_text import markdown_text, plain_text

SETTINGS = {
    "phase": "pretrain",
    "samples": 512,
    "weights": "live",
    "num_steps": 25,
    "guidance_scale": 4.0,
    "shift": 1.0,
}
BEGIN = f"![{markdown_text(READING)}](data:image/jpeg;base64,"
GREY = (90, 120, 150)
PATH = "runs/r/previews/pretrain-0123/000000000512.safetensors"


def decoded(latent: torch.Tensor) -> torch.Tensor:
    """Three of the channels, each value on 8 x 8 pixels."""
    return latent[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


class Real:
    """Reads real pictures of one colour, in the sizes that are asked for; or cannot."""

    def __init__(self, problem: str = "") -> None:
        self.problem, self.asked = problem, []

    def __call__(self, wanted):
        self.asked.append(list(wanted))
        if self.problem:
            raise StoreError(self.problem)
        return [np.full((*size, 3), GREY, dtype=np.uint8) for _, size in wanted]


CAPTIONS = ["a red circle", "ein grünes Quadrat", "three bars", "b"]
COMPARED = {
    "captions": json.dumps(CAPTIONS),
    "keys": json.dumps(["k0", "k1", "k2", "k3"]),
    "splits": json.dumps(["train", "train", "held_out", "held_out"]),
    "settings": json.dumps(SETTINGS),
}


def page_of(tmp_path, metadata: dict[str, str], real: Real):
    store = open_store(str(tmp_path))
    latents = {f"{place:03d}": torch.full((16, 4, 8 if place else 4), place / 5) for place in range(4)}
    store.put(PATH, save(latents, metadata))
    decoder = PreviewDecoder(store, "towers/none", real)
    decoder.autoencoder = SimpleNamespace(decode=decoded)
    markdown, where = decoder.page(PATH)
    assert where == str(tmp_path / PATH.replace(".safetensors", ".png"))
    return markdown, store.get(PATH.replace(".safetensors", ".png"))


def test_training_captions_and_held_out_ones_stand_side_by_side_and_are_called_so(tmp_path):
    real = Real()
    markdown, png = page_of(tmp_path, COMPARED, real)
    assert real.asked == [[("k0", (32, 32)), ("k1", (32, 64)), ("k2", (32, 64)), ("k3", (32, 64))]]
    inside = read_settings(png)
    assert json.loads(inside["prompts"]) == CAPTIONS and json.loads(inside["settings"]) == SETTINGS
    assert json.loads(inside["splits"]) == ["train", "train", "held_out", "held_out"]
    grid = np.asarray(Image.open(io.BytesIO(png)))
    assert (grid == GREY).all(axis=2).sum() == 4 * (32 * 64 + 32 * 64 + 32 * 64 + 32 * 32)  # twice as large
    assert markdown.startswith(f"## pretrain: pictures after 512 samples\n\n{BEGIN}")
    lists = "**captions trained on**\n\n1. a red circle\n2. ein grünes Quadrat\n\n**held-out captions**\n\n1. three bars\n2. b"
    assert markdown.endswith(f"\n\n{lists}\n\nlive weights, 25 steps, guidance 4")


def test_the_terminal_finds_the_picture_and_says_how_to_read_it(tmp_path):
    markdown, _ = page_of(tmp_path, COMPARED, Real())
    shown = _picture([{"data": markdown, "description": "/store/a.png"}])
    assert (shown.path, shown.reading) == ("/store/a.png", READING) and shown.image.startswith(b"\xff\xd8")


def test_real_pictures_that_cannot_be_read_are_left_out_with_the_reason(tmp_path):
    markdown, png = page_of(tmp_path, COMPARED, Real("s3://bucket: cannot be reached"))
    assert "the real pictures could not be read: s3://bucket: cannot be reached" in plain_text(markdown)
    assert not (np.asarray(Image.open(io.BytesIO(png))) == GREY).all(axis=2).any()


def test_latents_that_an_earlier_version_wrote_are_shown_without_a_word_of_what_they_are(tmp_path):
    """A run that stood when the version changed goes on."""
    real = Real()
    markdown, png = page_of(tmp_path, {name: COMPARED[name] for name in ("captions", "settings")}, real)
    assert not real.asked and "trained on" not in markdown
    assert "1. a red circle\n2. ein grünes Quadrat\n3. three bars\n4. b" in markdown
    assert read_settings(png).keys() == {"prompts", "settings"}
