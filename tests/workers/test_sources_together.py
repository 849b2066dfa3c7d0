"""Tars with several captions, a filter, a captioner, flips and min_scale at once, through the real stages with models that count."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from counting_models import TOWERS, count_models
from data_chain import encode_all
from in_process import without_ray
from PIL import Image
from source_files import LONG_AGO_S, SourceFolder, tar_of

import workers.filter
from sd3core.captions.said import Said
from sd3core.data.encoded_shards import ORIGINAL
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.shard_rows import ShardFiles, ShardRows, join_rows
from sd3core.data.size_rule import TOO_SMALL
from sd3core.data.store import open_store
from sd3core.filters.row_rules import DUPLICATE, HAS_PATTERN, LEAKED
from sd3core.flip_rule import SIDES
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.encode_latents import FLIPPED, NOT_FLIPPED
from workers.filter import filter_stage
from workers.ingest import ingest_stage
from workers.stage import NOTHING_TO_DO

WORDS = ["oak", "elm", "ash", "fir", "yew", "bay", "fig", "box", "gum", "nut"]
IMAGES, COPIES, SMALL, SPAM = 40, 3, 5, 2  # pictures; smaller than a bucket; with a caption that the filter forbids

IN_FIRST = 25  # pictures of the first tar
SPAM_CAPTIONS = ("fine", "click here")


def _sample(number: int, seed: int, side: int = 64, *captions: str) -> list[tuple[str, bytes]]:
    """A picture of noise with two captions."""
    noise = np.random.default_rng(seed).integers(30, 226, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).save(sink, "PNG")
    said = {"caption": captions or [f"a thing {'x' * number}", f"another {'x' * number}"]}
    return [(f"{number:05d}.png", sink.getvalue()), (f"{number:05d}.json", json.dumps(said).encode())]


def _tar(*samples: list[tuple[str, bytes]]) -> bytes:
    return tar_of(member for sample in samples for member in sample)


def _first_tar(spam: int = -1) -> bytes:
    """`spam`: a picture with a forbidden caption."""
    return _tar(
        *(_sample(n, n, 40 if n < SMALL else 64, *(SPAM_CAPTIONS if n == spam else ())) for n in range(IN_FIRST))
    )


@pytest.fixture
def source(tmp_path) -> SourceFolder:
    folder = SourceFolder(str(tmp_path / "source"))
    plain = [_sample(n, n, 64, *(SPAM_CAPTIONS if n >= IMAGES - SPAM else ())) for n in range(IN_FIRST, IMAGES)]
    folder.put("00000.tar", _first_tar())
    folder.put("00001.tar", _tar(*plain, *(_sample(100 + n, 10 + n, 80) for n in range(COPIES))))
    return folder


def test_all_rows_are_accounted_for_and_what_changes_alone_is_made(source, tmp_path, monkeypatch):
    seen, store = count_models(monkeypatch, tmp_path), open_store(str(tmp_path / "store"))
    without_ray(monkeypatch, workers.filter)
    seen.say = lambda colour: Said(
        f"shade {'left' if colour[0] % 2 else 'plain'} {WORDS[colour[1] % 10]} {WORDS[colour[2] % 10]}"
    )
    settings = [
        *("data.source=webdataset", f"data.urls={source.url}", "data.rows_per_shard=8", "data.name=together"),
        *("data.held_out_fraction=0.25", "caption.captioner=vision_language_model", "caption.model=/m"),
        *("encode.flip=true", "filter.duplicates={}", "filter.caption_forbids=click here", "finetune.0.min_scale=1"),
    ]
    recipe = load_recipe("tiny-test", settings)

    def run() -> tuple[set[str], dict[str, Manifest], tuple[int, int, int]]:
        """Why each stage worked; what stands; how many images were captioned and encoded, and texts encoded."""
        seen.captioned = seen.encoded = 0
        seen.texts.clear()
        raw = ingest_stage(recipe, store, ignore_progress)
        keep = filter_stage(recipe, store, raw.manifest, ignore_progress)
        captions = caption_stage(recipe, store, raw.manifest, ignore_progress, keep.manifest)
        parts = encode_all(recipe, store, raw.manifest, captions.manifest, TOWERS, keep=keep.manifest)
        made = {"raw": raw, "keep": keep, "captions": captions} | parts
        manifests = {
            name: read_manifest(store, part.manifest.folder, part.manifest.digest) for name, part in made.items()
        }
        texts = len([text for text in seen.texts if text])
        return {part.reason for part in made.values()}, manifests, (seen.captioned, seen.encoded, texts)

    _, first, shown = run()
    kept = IMAGES - SPAM
    gone = first["keep"].failed_reasons
    assert first["raw"].rows == IMAGES + COPIES and first["keep"].rows == kept
    assert gone.pop(HAS_PATTERN) == SPAM and gone.keys() <= {DUPLICATE, LEAKED} and sum(gone.values()) == COPIES
    assert (first["captions"].rows, first["text"].rows, first["latents.pretrain"].rows) == (kept, 3 * kept, kept)
    assert first["latents.finetune.0"].rows == kept - SMALL
    assert first["latents.finetune.0"].failed_reasons == {TOO_SMALL: SMALL}
    counts = first["latents.pretrain"].buckets
    flipped, training = counts[FLIPPED], kept - counts["32x32 held out"]
    assert 0 < flipped == training - counts[NOT_FLIPPED + SIDES]
    small = first["latents.finetune.0"].buckets
    assert shown[:2] == (kept, 2 * kept - SMALL + flipped + small[FLIPPED])
    for name in ("latents.pretrain", "latents.finetune.0"):
        latents, text = first[name], first["text"]
        for images, captions in zip(latents.shards, text.shards, strict=True):
            files = ShardFiles.of(images), latents.folder, ShardFiles.of(captions), text.folder
            rows = ShardRows(join_rows(store, *files))
            assert not rows.without_caption()
            assert all(len({rows.place(row, ORIGINAL, drawn) for drawn in (0.0, 0.5)}) == 2 for row in range(len(rows)))

    assert run() == ({NOTHING_TO_DO}, first, (0, 0, 0))

    source.put("00002.tar", _tar(_sample(200, 10, 96), _sample(201, 500)))
    reasons, grown, shown = run()
    assert shown[0] == 1 and shown[2] <= 3 and grown["keep"].rows == kept + 1
    assert "1 of 8 shards was missing" in reasons and NOTHING_TO_DO not in reasons
    source.delete("00002.tar")
    assert run()[1:] == (first, (0, 0, 0))

    source.put("00000.tar", _first_tar(spam=7), LONG_AGO_S + 1)
    _, fewer, shown = run()
    assert shown == (0, 0, 0) and fewer["keep"].failed_reasons[HAS_PATTERN] == SPAM + 1
    assert {fewer[name].rows for name in ("keep", "captions", "latents.pretrain")} == {kept - 1}
    changed = {
        name: sum(a.stem != b.stem for a, b in zip(fewer[name].shards, first[name].shards, strict=True))
        for name in first
    }
    assert set(changed.values()) == {1}
