"""A batch as tensors, made of its packed bytes without a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from sd3core.data.batch_bytes import BatchLayout
from sd3core.data.stored_text import StoredText, tensor_at


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one bucket, such as a rank's part of a step."""

    latent: Tensor  # (B, 16, h, w), normalised, in the precision it is stored in
    text: StoredText
    sample_ids: np.ndarray  # (B,) int64
    epochs: np.ndarray  # (B,) int64
    keys: list[str]
    bucket: str  # HEIGHTxWIDTH in px


def unpacked(layout: BatchLayout, memory: Any) -> Batch:
    """Its tensors are views of `memory`, the writable bytes of the batch's buffer, which live as long as they do."""
    text = {name: tensor_at(place, memory) for name, place in layout.text.items()}
    return Batch(
        tensor_at(layout.latent, memory),
        StoredText(text, layout.clip_tokens, layout.t5_tokens),
        layout.sample_ids,
        layout.epochs,
        layout.keys,
        layout.bucket,
    )
