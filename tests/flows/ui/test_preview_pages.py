"""Latents that the ranks wrote become a PNG with its settings inside and a page, by any autoencoder."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from safetensors.torch import save

from flows.ui.previews import PreviewDecoder
from sd3core.data.store import open_store
from sd3core.pictures import read_settings

SETTINGS = {
    "phase": "pretrain",
    "samples": 512,
    "weights": "live",
    "num_steps": 25,
    "guidance_scale": 4.0,
    "shift": 1.0,
}
PATH = "runs/r/previews/pretrain-0123/000000000512.safetensors"


def decoded(latent: torch.Tensor) -> torch.Tensor:
    """Three of the channels, each value on 8 x 8 pixels."""
    return latent[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)


def test_a_grid_beside_the_latents_and_a_page_with_the_captions(tmp_path):
    store = open_store(str(tmp_path))
    latents = {f"{place:03d}": torch.full((16, 4, 4), place / 5) for place in range(5)}
    captions = ["a red circle", "ein grünes Quadrat", "three bars", "b", "c"]
    store.put(PATH, save(latents, {"captions": json.dumps(captions), "settings": json.dumps(SETTINGS)}))
    decoder = PreviewDecoder(store, "towers/none")
    decoder.autoencoder = SimpleNamespace(decode=decoded)

    markdown, where = decoder.page(PATH)
    assert where == str(tmp_path / PATH.replace(".safetensors", ".png"))
    png = store.get(PATH.replace(".safetensors", ".png"))
    inside = read_settings(png)
    assert json.loads(inside["prompts"]) == captions and json.loads(inside["settings"]) == SETTINGS
    assert markdown.startswith("## pretrain: pictures after 512 samples\n\n![row by row](data:image/jpeg;base64,")
    assert "1. a red circle\n2. ein grünes Quadrat\n" in markdown
    assert markdown.endswith("live weights, 25 steps, guidance 4")
