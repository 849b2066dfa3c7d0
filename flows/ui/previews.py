"""Draws pictures while a phase trains: captions trained on beside held-out ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, cached_property

import numpy as np

from flows.ui.artifacts import Shown, markdown_picture
from flows.upstream import Upstream
from sd3core.buckets import Side
from sd3core.comparison_grid import READING, ComparedPicture, captions_in_words, comparison_grid
from sd3core.data.compared_rows import compared_rows
from sd3core.data.encoded_shards import Split
from sd3core.data.images import PixelRules
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.shards import read_table
from sd3core.data.split_rows import Row, read_row_crops, read_rows
from sd3core.data.store import Store
from sd3core.errors import UserError
from sd3core.files.local_paths import shown_place
from sd3core.pictures import encode_png, make_grid, page_jpeg, to_uint8
from sd3core.recipe import Recipe, Training
from sd3core.shown_text import markdown_text
from sd3core.towers.artifact import fetch_towers
from workers.caches import checked_here, towers_cache
from workers.trainer.job import PreviewCaption, PreviewSettings

PICTURES, COLUMNS = 8, 4

ReadReal = Callable[[Sequence[tuple[str, Side]]], list[np.ndarray]]  # rows by their keys, and the sizes wanted


def preview_settings(upstream: Upstream, key: str, phase: Training) -> PreviewSettings:
    """Settings of a phase's previews, which are sampled as evaluation samples."""
    evaluate = upstream.recipe.evaluate
    return PreviewSettings(
        captions=preview_captions(upstream, key),
        num_steps=evaluate.num_steps,
        guidance_scale=evaluate.guidance_scale,
        shift=evaluate.shift_for(phase),
        sampler=evaluate.sampler,
    )


def preview_captions(upstream: Upstream, key: str) -> list[PreviewCaption]:
    """The captions whose pictures a phase shows: as many that it trains on as held-out ones."""
    raw, rows = _preview_rows(upstream, key)
    numbers = {shard.stem: shard.number for shard in raw.shards}
    synthetic = _synthetic_captions(upstream, {numbers[row.stem] for _, row in rows if not row.caption})
    return [
        PreviewCaption(
            shard=numbers[row.stem], key=row.key, caption=row.caption or synthetic.get(row.key, ""), split=split
        )
        for split, row in rows
    ]


def _preview_rows(upstream: Upstream, key: str) -> tuple[Manifest, list[tuple[Split, Row]]]:
    store, refs = upstream.store, (upstream.raw, upstream.latents(key))
    raw, latents = (read_manifest(store, ref.folder, ref.digest) for ref in refs)
    held_out = bool(upstream.recipe.data.held_out_fraction)
    return raw, compared_rows(store, raw, latents, PICTURES // 2, held_out=held_out, captioned=False)


def real_pictures(upstream: Upstream, key: str) -> ReadReal:
    """Reads the real pictures of a phase's previews, cropped as training's."""
    find_rows = cache(lambda: _preview_rows(upstream, key))

    def read(wanted: Sequence[tuple[str, Side]]) -> list[np.ndarray]:
        raw, rows = find_rows()
        by_key = {row.key: row for _, row in rows}
        chosen, sides = [by_key[name] for name, _ in wanted], [size for _, size in wanted]
        rules = PixelRules.of(upstream.recipe.data)
        return read_row_crops(upstream.store, raw, chosen, sides, rules, checked_here())

    return read


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
    """Latents that the ranks wrote -> a PNG beside them, and a page for the UI. Loads the run's VAE with the first one.

    read_real() may raise a UserError: then the page says why it shows no real pictures.
    """

    def __init__(self, store: Store, towers: str, read_real: ReadReal) -> None:
        self.store, self.towers, self._read_real = store, towers, read_real

    @cached_property
    def autoencoder(self):
        from sd3core.towers.autoencoder import load_autoencoder  # loads diffusers, which a finished phase does not need

        return load_autoencoder(fetch_towers(self.store, self.towers, towers_cache(), only=("vae",)))

    def page(self, path: str) -> Shown:
        """(markdown, where the PNG stands) of the latents at `path`."""
        from safetensors.torch import load as load_tensors

        data = self.store.get(path)
        tensors, metadata = load_tensors(data), _metadata(data)
        images = [to_uint8(self.autoencoder.decode(tensors[name][None]))[0] for name in sorted(tensors)]
        captions, settings = json.loads(metadata["captions"]), json.loads(metadata["settings"])
        if "splits" in metadata:
            keys, splits = json.loads(metadata["keys"]), json.loads(metadata["splits"])
            real, problem = self._real(keys, images)
            rows = zip(splits, captions, images, real, strict=True)
            pictures = [ComparedPicture(*row) for row in rows]
            grid, words = comparison_grid(pictures), captions_in_words(pictures)
        else:  # an earlier version's, of held-out captions alone
            grid, words, problem = make_grid(images, COLUMNS), [("captions", captions)], ""
        png = path.removesuffix(".safetensors") + ".png"
        told = {"prompts": metadata["captions"], "settings": metadata["settings"]}
        told |= {"splits": metadata["splits"]} if "splits" in metadata else {}
        self.store.put(png, encode_png(grid, told))
        return _markdown(grid, words, settings, problem), shown_place(self.store.uri(png))

    def _real(self, keys: list[str], drawn: list[np.ndarray]) -> tuple[list[np.ndarray | None], str]:
        """The real pictures in the drawn ones' sizes; none, and why, where they cannot be read."""
        try:
            return [*self._read_real([(key, image.shape[:2]) for key, image in zip(keys, drawn, strict=True)])], ""
        except UserError as error:
            return [None] * len(keys), f"the real pictures could not be read: {error}"


def _markdown(grid: np.ndarray, words: list[tuple[str, list[str]]], settings: dict[str, object], problem: str) -> str:
    title = f"## {markdown_text(str(settings['phase']))}: pictures after {settings['samples']:,} samples"
    drawn = f"{settings['weights']} weights, {settings['num_steps']} steps, guidance {settings['guidance_scale']:g}"
    lists = [
        "\n".join(
            [f"**{heading}**\n", *(f"{number}. {markdown_text(caption)}" for number, caption in enumerate(captions, 1))]
        )
        for heading, captions in words
    ]
    reading = READING if len(words) > 1 else f"{words[0][0]}, row by row"
    said = [markdown_text(problem)] if problem else []
    return "\n\n".join([title, markdown_picture(reading, page_jpeg(grid)), *lists, drawn, *said])


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of safetensors bytes, which begin with the header's length (8 bytes, little endian) and the header."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
