"""Finished latents and text shards of a made-up data set, with values that tell their row and caption."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import torch

from sd3core.conditioning import TextFeatures
from sd3core.data.encoded_shards import (
    FILE_DIGEST,
    TEXT_SCHEMA,
    WITHOUT_CAPTION,
    caption_id,
    held_out_count,
    latent_bytes,
)
from sd3core.data.manifest import Manifest, ShardEntry
from sd3core.data.shards import TAR_BLOCK, Sample, is_held_out, parts_digest, shard_stem, write_shard
from sd3core.data.stored_text import StoredText

BUCKETS = ("64x64", "64x48")
CLIP_TOKENS, T5_TOKENS, HELD_OUT = 4, 6, 0.25
LATENTS_SCHEMA = pa.schema([("bucket", pa.string()), ("split", pa.string()), FILE_DIGEST])
TEXT_COLUMNS = pa.schema([("kind", pa.string()), ("caption_id", pa.string()), FILE_DIGEST, TEXT_SCHEMA.field("place")])


def key_of(number: int, row: int) -> str:
    return f"image-{number}-{row:03d}"


def bucket_of(key: str) -> str:
    return BUCKETS[int(key[-3:]) % 3 == 0]


def captions_of(key: str) -> dict[str, str]:
    """Every fifth row has no original caption, every seventh no synthetic one; so every 35th has none."""
    row = int(key[-3:])
    captions = {} if row % 5 == 4 else {"original": f"one of {row % 4}"}  # shared by many rows
    return captions if row % 7 == 6 else captions | {"synthetic": f"synthetic {key}"}


def _seeded(name: str, *shape: int) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latent_of(key: str) -> torch.Tensor:
    height, width = map(int, bucket_of(key).split("x"))
    return _seeded(key, 16, height // 8, width // 8).half()


def features_of(caption: str) -> TextFeatures:
    length = len(caption) % 3 + 2
    return TextFeatures(
        clip_l=_seeded(f"l{caption}", 1, CLIP_TOKENS, 5),
        clip_g=_seeded(f"g{caption}", 1, CLIP_TOKENS, 7),
        t5=_seeded(f"t{caption}", 1, T5_TOKENS, 9),
        clip_l_pooled=_seeded(f"lp{caption}", 1, 5),
        clip_g_pooled=_seeded(f"gp{caption}", 1, 3),
        lengths=torch.full((1, 3), length),
    ).trimmed()


def flipped_of(key: str) -> torch.Tensor | None:
    """The latent of the flipped image, of those that train and whose row is even."""
    if int(key[-3:]) % 2 or split_of(key) == "held_out":
        return None
    height, width = map(int, bucket_of(key).split("x"))
    return _seeded(f"flipped {key}", 16, height // 8, width // 8).half()


def write_latents(store, folder: str, number: int, rows: int, flips: bool = False) -> ShardEntry:
    """As the encode stage does, sorted by bucket and split."""
    samples, counts = [], Counter()
    for key in sorted(
        (key_of(number, row) for row in range(rows)), key=lambda k: (bucket_of(k), split_of(k) != "train")
    ):
        flipped = flipped_of(key) if flips else None
        data, bucket, split = latent_bytes(latent_of(key), flipped), bucket_of(key), split_of(key)
        if split == "held_out":
            counts[held_out_count(bucket)] += 1
        row = {"bucket": bucket, "split": split, "sha256": hashlib.sha256(data).digest()}
        samples.append(Sample(key, {"safetensors": data}, row))
    stem = shard_stem(number, parts_digest(folder, str(number)))
    return ShardEntry.of(
        write_shard(store, folder, stem, samples, [], LATENTS_SCHEMA, count_by="bucket", counts=dict(counts))
    )


def further_of(key: str) -> list[str]:
    """Where images have several original captions, those after the first: none, one or three."""
    return [f"{place} more of {key}" for place in range((0, 1, 3)[int(key[-3:]) % 3])]


def write_text(store, folder: str, number: int, rows: int, several: bool = False) -> ShardEntry:
    """`several`: rows that have an original caption have those of `further_of`, too."""
    uses: dict[str, list[dict]] = {}
    keys = [key_of(number, row) for row in range(rows)]
    for key in keys:
        for kind, caption in captions_of(key).items():
            further = further_of(key) if several and kind == "original" else []
            for place, text in enumerate([caption, *further]):
                uses.setdefault(text, []).append({"key": key, "kind": kind, "place": place if further else None})

    def samples():
        offset = 0
        for caption, users in uses.items():
            name, data = caption_id(caption), StoredText.of(features_of(caption), "float32").to_bytes("trimmed")
            length = TAR_BLOCK * (1 + math.ceil(len(data) / TAR_BLOCK))
            for place, use in enumerate(users):
                row = use | {"caption_id": name, "offset": offset, "length": length}
                row["sha256"] = hashlib.sha256(data).digest()
                yield Sample(name, {"safetensors": data} if place == 0 else {}, row)
            offset += length

    stem = shard_stem(number, parts_digest(folder, str(number)))
    without = sum(not captions_of(key) for key in keys)
    counts = {WITHOUT_CAPTION: without} if without else {}
    return ShardEntry.of(write_shard(store, folder, stem, samples(), [], TEXT_COLUMNS, counts=counts))


def split_of(key: str) -> str:
    return "held_out" if is_held_out(key, HELD_OUT) else "train"


def write_data_set(
    store, shards: int = 3, rows: int = 40, several: bool = False, flips: bool = False
) -> tuple[Manifest, Manifest]:
    latents = [write_latents(store, "latents", number, rows, flips) for number in range(shards)]
    text = [write_text(store, "text", number, rows, several) for number in range(shards)]
    common = {"spec": "0" * 12, "inputs": {"raw": "r" * 64}}
    tokens = {"text": {"clip_tokens": CLIP_TOKENS, "t5_tokens": T5_TOKENS}}
    return (
        Manifest(stage="latents", fields={"flip": 1} if flips else {}, folder="latents", shards=latents, **common),
        Manifest(stage="text", fields=tokens, folder="text", shards=text, **common),
    )


def all_keys(shards: int = 3, rows: int = 40) -> list[str]:
    return [key_of(number, row) for number in range(shards) for row in range(rows)]


def as_numbers(batch) -> list[np.ndarray]:
    return [batch.latent.numpy(), batch.text.features().t5.numpy(), batch.sample_ids, batch.epochs]
