"""Draws pictures while a phase trains: a grid beside the latents of the ranks."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np

from flows.ui.artifacts import Shown, markdown_picture
from flows.upstream import Upstream
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.shards import read_table
from sd3core.data.split_rows import Row, read_rows
from sd3core.data.store import Store
from sd3core.files.local_paths import shown_place
from sd3core.pictures import encode_png, make_grid, page_jpeg, to_uint8
from sd3core.recipe import Recipe, Training
from sd3core.shown_text import markdown_text
from sd3core.towers.artifact import fetch_towers
from workers.caches import towers_cache
from workers.trainer.job import PreviewCaption, PreviewSettings

PICTURES, COLUMNS = 8, 4


def preview_settings(upstream: Upstream, phase: Training) -> PreviewSettings:
    """Settings of a phase's previews, which are sampled as evaluation samples."""
    evaluate = upstream.recipe.evaluate
    return PreviewSettings(
        captions=preview_captions(upstream),
        num_steps=evaluate.num_steps,
        guidance_scale=evaluate.guidance_scale,
        shift=evaluate.shift_for(phase),
        sampler=evaluate.sampler,
    )


def preview_captions(upstream: Upstream) -> list[PreviewCaption]:
    """The captions of the held-out rows whose pictures a phase shows."""
    recipe, store = upstream.recipe, upstream.store
    raw = read_manifest(store, upstream.raw.folder, upstream.raw.digest)
    rows = shown_rows(recipe, store, raw)
    numbers = {shard.stem: shard.number for shard in raw.shards}
    synthetic = _synthetic_captions(upstream, {numbers[row.stem] for row in rows if not row.caption})
    return [
        PreviewCaption(shard=numbers[row.stem], key=row.key, caption=row.caption or synthetic.get(row.key, ""))
        for row in rows
    ]


def shown_rows(recipe: Recipe, store: Store, raw: Manifest) -> list[Row]:
    """A few of the held-out part, of the training part where none is held out."""
    held_out = read_rows(store, raw, "held_out", PICTURES) if recipe.data.held_out_fraction else []
    return held_out or read_rows(store, raw, "train", PICTURES)


def _synthetic_captions(upstream: Upstream, numbers: set[int]) -> dict[str, str]:
    """Key -> caption of some shards."""
    reference = upstream.captions if numbers else None
    if reference is None:
        return {}
    manifest = read_manifest(upstream.store, reference.folder, reference.digest)
    tables = [
        read_table(upstream.store, manifest.folder, shard.stem, shard.digest)
        for shard in manifest.shards
        if shard.number in numbers
    ]
    return {row["key"]: row["caption"] for table in tables for row in table.select(["key", "caption"]).to_pylist()}


class PreviewDecoder:
    """Latents that the ranks wrote -> a PNG beside them, and a page for the UI. Loads the run's VAE with the first one."""

    def __init__(self, store: Store, towers: str) -> None:
        self.store, self.towers = store, towers

    @cached_property
    def autoencoder(self):
        from sd3core.towers.autoencoder import load_autoencoder  # loads diffusers, which a finished phase does not need

        return load_autoencoder(fetch_towers(self.store, self.towers, towers_cache(), only=("vae",)))

    def page(self, path: str) -> Shown:
        """(markdown, where the PNG stands) of the latents at `path`."""
        from safetensors.torch import load as load_tensors

        data = self.store.get(path)
        tensors, metadata = load_tensors(data), _metadata(data)
        captions, settings = json.loads(metadata["captions"]), json.loads(metadata["settings"])
        images = [to_uint8(self.autoencoder.decode(tensors[name][None]))[0] for name in sorted(tensors)]
        grid = make_grid(images, COLUMNS)
        png = path.removesuffix(".safetensors") + ".png"
        self.store.put(png, encode_png(grid, {"prompts": metadata["captions"], "settings": metadata["settings"]}))
        return _markdown(grid, captions, settings), shown_place(self.store.uri(png))


def _markdown(grid: np.ndarray, captions: list[str], settings: dict[str, object]) -> str:
    title = f"## {markdown_text(str(settings['phase']))}: pictures after {settings['samples']:,} samples"
    drawn = f"{settings['weights']} weights, {settings['num_steps']} steps, guidance {settings['guidance_scale']:g}"
    lines = "\n".join(f"{number}. {markdown_text(caption)}" for number, caption in enumerate(captions, 1))
    return "\n\n".join([title, markdown_picture("row by row", page_jpeg(grid)), lines, drawn])


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of safetensors bytes, which begin with the header's length (8 bytes, little endian) and the header."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
