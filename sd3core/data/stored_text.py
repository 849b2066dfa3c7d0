"""How text features are stored and read: whole or trimmed, in 32, 16 or 8 bits.

Whole or trimmed is the recipe's `text.padding`, for it is what the model sees. With "reference" the positions after a
caption's end are outputs of the encoders that differ from caption to caption and follow from nothing that could be kept
instead, so all are stored. With "trimmed" they are zeros: they are not stored, and come back to the bit.

8 bits: q = round(x / s) of each channel, s = max |x| / 127 over a token's SCALE_GROUP = 128 channels. No channel is off
by more than s / 2, nor by more than |x|, so a group's error has at most 0.045 times its length, and a token as it is read
a cosine of at least 0.999 with the token, whatever the values. One scale for all of a token's channels has no such bound:
among T5's 4,096 a few are far larger than the rest, much of which one scale would round to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch.nn.functional import pad

from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.data.batch_bytes import SCALES_ENDING, PlainBuffer, TensorPacking, TensorPlace, pack_text
from sd3core.files.tensor_files import SAFETENSORS_DTYPES
from sd3core.recipe import TextDtype

SCALE_GROUP = 128  # channels of a token that share a scale; the last group of a width may be smaller
SCALE_DTYPE = torch.bfloat16  # float32's range in two bytes; that it is rounded is in the bound
POOLED_DTYPE = torch.float16  # beside 8-bit sequences: 1 % of their bytes
LARGEST_STEP = 127


@dataclass(frozen=True, eq=False)
class StoredText:
    """The text features of a batch of captions in the precision in which they are stored.

    `tensors` has `TextFeatures`' by their names, sequences as long as the batch's longest; where they are int8, also
    NAME_scales (B, T, ceil(W / SCALE_GROUP)). `features` gives what the model takes.
    """

    tensors: dict[str, Tensor]
    clip_tokens: int
    t5_tokens: int

    @staticmethod
    def of(features: TextFeatures, dtype: TextDtype) -> StoredText:
        """Features as they will be stored."""
        if dtype != "int8":
            stored = features.to(getattr(torch, dtype))
            tensors = {f.name: getattr(stored, f.name) for f in fields(stored)}
        else:
            rounded = features.to(POOLED_DTYPE)
            tensors = {f.name: getattr(rounded, f.name) for f in fields(rounded) if f.name not in ENCODERS}
            for name in ENCODERS:
                tensors[name], tensors[name + SCALES_ENDING] = quantise(getattr(features, name))
        return StoredText(tensors, features.clip_l.shape[1], features.t5.shape[1])

    @staticmethod
    def from_bytes(files: Sequence[bytes], *, clip_tokens: int, t5_tokens: int) -> StoredText:
        """Inverse of to_bytes, of several captions.

        Raises DataError where bytes are no such features or hold more tokens than asked for.
        """
        packing, tokens = TensorPacking(), {"clip_tokens": clip_tokens, "t5_tokens": t5_tokens}
        places = pack_text(packing, files, **tokens)
        buffer = PlainBuffer(packing.size)
        packing.write_to(buffer)
        return StoredText({name: tensor_at(place, buffer.memory) for name, place in places.items()}, **tokens)

    def __len__(self) -> int:
        return len(self.tensors["lengths"])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_finite(self) -> bool:
        """Whether nothing is NaN or infinite, or became so by the precision."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors.values())

    def index(self, rows: Sequence[int]) -> StoredText:
        """Some captions of the batch."""
        return StoredText(
            {name: tensor[rows] for name, tensor in self.tensors.items()}, self.clip_tokens, self.t5_tokens
        )

    def to_bytes(self, padding: Literal["reference", "trimmed"]) -> bytes:
        """One caption (B = 1) as safetensors without the batch axis; "trimmed" keeps the real tokens only."""
        if len(self) != 1:
            raise ValueError(f"to_bytes takes one caption, not {len(self)}; take index([i]) first")
        tensors = {name: tensor[0] for name, tensor in self.tensors.items()}
        if padding == "trimmed":
            for name, length in zip(ENCODERS, tensors["lengths"].tolist(), strict=True):
                for part in {name, name + SCALES_ENDING} & tensors.keys():
                    tensors[part] = tensors[part][:length]
        return save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})

    def features(self, device: torch.device | str = "cpu") -> TextFeatures:
        """In float32 on the device, to which they travel as they are stored; zeros after the stored tokens."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        for name, tokens in zip(ENCODERS, (self.clip_tokens, self.clip_tokens, self.t5_tokens), strict=True):
            scales = tensors.pop(name + SCALES_ENDING, None)
            sequence = tensors[name].float() if scales is None else dequantise(tensors[name], scales)
            missing = tokens - sequence.shape[1]
            tensors[name] = pad(sequence, (0, 0, 0, missing)) if missing else sequence  # pad copies in any case
        return TextFeatures(**tensors).to(torch.float32)


def quantise(values: Tensor, group: int = SCALE_GROUP) -> tuple[Tensor, Tensor]:
    """(..., W) -> int8 (..., W) and the scales (..., ceil(W / group)): value = int8 * scale of its group."""
    width = values.shape[-1]
    grouped = pad(values.float(), (0, -width % group)).unflatten(-1, (-1, group))  # (..., G, group)
    scales = (grouped.abs().amax(dim=-1) / LARGEST_STEP).to(SCALE_DTYPE)  # (..., G)
    # a group of zeros has scale 0
    steps = grouped / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().clamp(-LARGEST_STEP, LARGEST_STEP).to(torch.int8).flatten(-2)[..., :width], scales


def dequantise(stored: Tensor, scales: Tensor, group: int = SCALE_GROUP) -> Tensor:
    """Inverse of quantise, float32."""
    width = stored.shape[-1]
    grouped = pad(stored, (0, -width % group)).unflatten(-1, (-1, group)).float()
    return (grouped * scales.float()[..., None]).flatten(-2)[..., :width]


def caption_bytes(tokens: Sequence[int], widths: Sequence[int], pooled: int, dtype: TextDtype) -> int:
    """What one caption's features take: `tokens` and `widths` of clip_l, clip_g and t5, `pooled` channels in all."""
    values = sum(count * width for count, width in zip(tokens, widths, strict=True))
    if dtype != "int8":
        return (values + pooled) * getattr(torch, dtype).itemsize
    scales = sum(count * -(-width // SCALE_GROUP) for count, width in zip(tokens, widths, strict=True))
    return values + scales * SCALE_DTYPE.itemsize + pooled * POOLED_DTYPE.itemsize


def tensor_at(place: TensorPlace, memory: Any) -> Tensor:
    """A packed tensor as a view of its buffer's `memory`, which is kept as long as the tensor is."""
    dtype, count = SAFETENSORS_DTYPES[place.dtype], math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=place.offset).view(place.shape)
