"""Lays the stored rows of a batch side by side into one buffer; loads no torch.

A batch's tensor is its rows' bytes one after the other, a sequence with zeros up to the length of the longest. Nothing is
computed, so a process that reads for another needs no torch, and the one that trains makes its tensors of the buffer
without a copy (`sd3core.data.batch`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from sd3core.buckets import DOWNSAMPLING, bucket_side
from sd3core.data.encoded_shards import ENCODE_AGAIN, FLIPPED_TENSOR, LATENT_TENSOR
from sd3core.errors import DataError
from sd3core.recipe import ENCODERS

ALIGNMENT = 64  # bytes
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
SCALES_ENDING = "_scales"  # ends the name of an 8-bit sequence's scales
TEXT_TENSORS = (*ENCODERS, "clip_l_pooled", "clip_g_pooled", "lengths")  # the fields of `TextFeatures`


class StoredTensor(NamedTuple):
    """One tensor of a safetensors file, as it lies there."""

    dtype: str  # as safetensors names it: a key of ITEM_BYTES
    shape: tuple[int, ...]
    data: memoryview


class TensorPlace(NamedTuple):
    """A tensor of a batch, (B, ...), in the batch's buffer."""

    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes


class StoredSample(NamedTuple):
    """A row's files as they are stored, checked."""

    latent: bytes
    text: bytes
    key: str
    sample_id: int
    where: str  # for messages


class BatchBuffer(Protocol):
    """Bytes of a batch, zeros at first."""

    def write(self, offset: int, data: memoryview) -> None: ...


class PlainBuffer:
    """A buffer in this process's memory."""

    def __init__(self, size: int) -> None:
        self.memory = np.zeros(size, dtype=np.uint8)

    def write(self, offset: int, data: memoryview) -> None:
        self.memory[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class BatchLayout:
    """What a batch is, and where its tensors lie in its buffer."""

    latent: TensorPlace
    text: dict[str, TensorPlace]
    clip_tokens: int
    t5_tokens: int
    sample_ids: np.ndarray  # (B,) int64
    epochs: np.ndarray  # (B,) int64
    keys: list[str]
    bucket: str  # HEIGHTxWIDTH in px
    size: int  # bytes of the buffer


@dataclass(frozen=True, eq=False)
class PackedBatch:
    layout: BatchLayout
    buffer: BatchBuffer


class TensorPacking:
    """Tensors that will lie in one buffer of `size` bytes, one after the other."""

    def __init__(self) -> None:
        self.size = 0
        self._rows: list[tuple[int, int, Sequence[StoredTensor]]] = []  # offset, bytes from row to row

    def add(self, rows: Sequence[StoredTensor], *, padded: bool = False) -> TensorPlace:
        """One tensor of these rows; `padded`: they may differ in length. ValueError where they do not fit each other."""
        dtype, shape = rows[0].dtype, rows[0].shape
        if padded:
            shape = (max(row.shape[0] for row in rows), *shape[1:])
        fixed = int(padded)  # axes from this one on are the same in all rows
        if any(row.dtype != dtype or row.shape[fixed:] != shape[fixed:] for row in rows):
            raise ValueError("rows of different sizes or precisions")
        stride = math.prod(shape) * ITEM_BYTES[dtype]
        place = TensorPlace(dtype, (len(rows), *shape), self.size)
        self._rows.append((self.size, stride, rows))
        self.size += -(-len(rows) * stride // ALIGNMENT) * ALIGNMENT
        return place

    def write_to(self, buffer: BatchBuffer) -> None:
        for offset, stride, rows in self._rows:
            for place, row in enumerate(rows):
                buffer.write(offset + place * stride, row.data)


def pack_batch(
    samples: Sequence[StoredSample],
    epochs: np.ndarray,
    bucket: str,
    *,
    clip_tokens: int,
    t5_tokens: int,
    allocate: Callable[[int], BatchBuffer] = PlainBuffer,
    flipped: np.ndarray | None = None,
) -> PackedBatch:
    """Rows of one bucket as a batch; `allocate`: bytes -> a buffer of zeros. DataError where a file is no such row's.

    flipped (B,) bool: of which rows the flipped image's latent is wanted, where they have one; None: of none.
    """
    packing, tokens = TensorPacking(), {"clip_tokens": clip_tokens, "t5_tokens": t5_tokens}
    wanted = np.zeros(len(samples), dtype=bool) if flipped is None else flipped
    latent = packing.add([_latent(sample, bucket, flip) for sample, flip in zip(samples, wanted.tolist(), strict=True)])
    text = pack_text(packing, [sample.text for sample in samples], **tokens)
    ids = np.array([sample.sample_id for sample in samples], dtype=np.int64)
    keys = [sample.key for sample in samples]
    layout = BatchLayout(
        latent, text, **tokens, sample_ids=ids, epochs=epochs, keys=keys, bucket=bucket, size=packing.size
    )
    buffer = allocate(packing.size)
    packing.write_to(buffer)
    return PackedBatch(layout, buffer)


def pack_text(
    packing: TensorPacking, files: Sequence[bytes], *, clip_tokens: int, t5_tokens: int
) -> dict[str, TensorPlace]:
    """Text features of several captions. DataError where bytes are no such features or hold more tokens than asked for."""
    most = {"clip_l": clip_tokens, "clip_g": clip_tokens, "t5": t5_tokens}
    rows = [_text_tensors(data, most) for data in files]
    try:
        return {
            name: packing.add([row[name] for row in rows], padded=name.removesuffix(SCALES_ENDING) in ENCODERS)
            for name in rows[0]
        }
    except (ValueError, KeyError) as error:  # KeyError: 8 bits in one row and more in another
        raise _unreadable_text(error) from None


def read_tensors(data: bytes) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, without a copy. ValueError where it is none."""
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        return {name: _stored_tensor(entry, memoryview(data)[begin:]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no safetensors: {error}") from None


def _stored_tensor(entry: dict, body: memoryview) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not 0 <= begin <= end <= len(body) or end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{dtype} of {shape} at bytes {begin} to {end} of {len(body)}")
    return StoredTensor(dtype, shape, body[begin:end])


def _latent(sample: StoredSample, bucket: str, flipped: bool) -> StoredTensor:
    height, width = bucket_side(bucket)
    try:
        tensors = read_tensors(sample.latent)
        latent = tensors[FLIPPED_TENSOR if flipped and FLIPPED_TENSOR in tensors else LATENT_TENSOR]
    except (KeyError, ValueError):
        raise DataError(f"{sample.where} holds no latent; {ENCODE_AGAIN}") from None
    if latent.shape[1:] != (height // DOWNSAMPLING, width // DOWNSAMPLING):
        raise DataError(f"{sample.where} has a latent of {latent.shape}, its bucket is {bucket} px; {ENCODE_AGAIN}")
    return latent


def _text_tensors(data: bytes, most: dict[str, int]) -> dict[str, StoredTensor]:
    """One caption's tensors, checked: `most` tokens of each encoder."""
    try:
        tensors = read_tensors(data)
        names = [*TEXT_TENSORS, *(name + SCALES_ENDING for name in ENCODERS if tensors[name].dtype == "I8")]
        stored = {name: tensors[name] for name in names}
    except (KeyError, ValueError) as error:
        raise _unreadable_text(error) from None
    for name, wanted in most.items():
        if stored[name].shape[0] > wanted:
            raise DataError(
                f"text features: {stored[name].shape[0]} stored {name} tokens do not fit {wanted}; encode again"
            )
    return stored


def _unreadable_text(error: Exception) -> DataError:
    return DataError(f"text features cannot be read ({error}); encode the shard again")
