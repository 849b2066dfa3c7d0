"""What text and latent shards hold: columns, tensors, the encoded empty string.

Workers write them, the trainer and evaluation read them.

    text tar       CAPTION_ID.safetensors   `StoredText`, each distinct caption of the shard once
    text index     a row for each key and caption (TEXT_SCHEMA): an image has one of a kind, or several originals
    latents tar    KEY.safetensors          "latent" (16, H/8, W/8), not normalised; of images that are flipped "flipped" too
    latents index  bucket, crop and split of each key (LATENT_SCHEMA)
    NULL_FILE      the encoded empty string, beside the text shards; NULL_RECORD has its size and SHA-256
    UNCAPTIONED    how many rows of each shard and bucket have no caption, where any has none (sd3core.data.uncaptioned)

Every row of both indexes has the SHA-256 of its file, so that rows are read by their ranges and checked one by one. Rows
of latents are sorted by bucket and split: what is trained on of one bucket is one range of the tar. The manifests' counts
say how many rows that are, and which shards have rows without a caption: a plan needs no index.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from sd3core.data.records import record_bytes
from sd3core.data.shards import optional_column
from sd3core.data.store import Store, StoreNotFound, canonical_json
from sd3core.errors import DataError
from sd3core.recipe import ENCODERS

if TYPE_CHECKING:
    from torch import Tensor

FEATURES = "safetensors"  # ending of both tars' files
LATENT_TENSOR, FLIPPED_TENSOR = "latent", "flipped"  # of a latent's file; the second where the image may be flipped
ORIGINAL, SYNTHETIC = "original", "synthetic"
CAPTION_KINDS = (ORIGINAL, SYNTHETIC)
Split = Literal["train", "held_out"]
NULL_FILE = "NULL.safetensors"
NULL_RECORD = "NULL.json"  # absent where an earlier version encoded it
UNCAPTIONED = "UNCAPTIONED."  # begins the name of a record of how many rows have none, beside the latents
WITHOUT_CAPTION = "without caption"  # a text shard's count of rows that have none
ENCODE_AGAIN = "run the stage again that makes it (encode; for the latents of a fine-tuning phase, finetune)"
FILE_DIGEST = ("sha256", pa.binary(32))  # of the row's file, without its tar header
TEXT_SCHEMA = pa.schema(
    [("kind", pa.string()), ("caption_id", pa.string()), FILE_DIGEST]
    + [(f"{name}_len", pa.int32()) for name in ENCODERS]
    # which of its image's captions of this kind it is, from 0 on, where the image has several
    + [optional_column("place", pa.int32())]
)
LATENT_SCHEMA = pa.schema(
    [("bucket", pa.string()), FILE_DIGEST]
    + [(f"crop_{side}", pa.int32()) for side in ("top", "left", "height", "width")]
    + [("split", pa.string())]
)


def held_out_count(bucket: str) -> str:
    """The name under which a latents shard counts its held-out rows of a bucket, beside the bucket's, which has all."""
    return f"{bucket} held out"


def caption_id(caption: str) -> str:
    """The name of a caption's features in its shard's tar."""
    return hashlib.sha256(caption.encode()).hexdigest()[:24]


def latent_bytes(latent: Tensor, flipped: Tensor | None = None) -> bytes:
    """`flipped`: the latent of the flipped image, which a flipped latent is not."""
    from safetensors.torch import save  # here: stages that hand out shards load no torch

    both = {LATENT_TENSOR: latent.contiguous()}
    return save(both if flipped is None else both | {FLIPPED_TENSOR: flipped.contiguous()})


def latent_of(data: bytes) -> Tensor:
    """Raises SafetensorError or KeyError for what is no latent."""
    from safetensors.torch import load

    return load(data)[LATENT_TENSOR]


def pin_null(store: Store, folder: str) -> str | None:
    """Writes the record of the encoded empty string where there is none; one that is damaged is taken away, for the
    stage to make again, and its path returned. One process calls it.
    """
    path, record = f"{folder}/{NULL_FILE}", f"{folder}/{NULL_RECORD}"
    try:
        data = store.get(path)
    except StoreNotFound:
        store.delete(record)  # the next one may be encoded by another machine, with other last bits
        return None
    recorded = _is_recorded(store, record, data)
    if recorded is None:
        store.put_json(record, record_bytes(data).model_dump())
    elif not recorded:
        store.delete(path)
        store.delete(record)
        return path
    return None


def read_null_bytes(store: Store, folder: str) -> bytes:
    """The encoded empty string. Raises DataError where it is not what its record says, or has none."""
    path, record = f"{folder}/{NULL_FILE}", f"{folder}/{NULL_RECORD}"
    data = store.get(path)
    recorded = _is_recorded(store, record, data)
    if recorded is None:
        raise DataError(
            f"{store.uri(path)}: an earlier version encoded it; run the encode stage: it writes {NULL_RECORD} beside it"
        )
    if not recorded:
        raise DataError(f"{store.uri(path)}: damaged, not what was encoded; run the encode stage: it is made again")
    return data


def _is_recorded(store: Store, record: str, data: bytes) -> bool | None:
    """Whether the record is of these bytes; None where there is none."""
    try:
        return store.get(record) == canonical_json(record_bytes(data).model_dump())
    except StoreNotFound:
        return None
