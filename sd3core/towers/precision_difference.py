"""How far encoders in bf16 are from the same encoders in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd3core.conditioning import ENCODERS
from sd3core.recipe import Text
from sd3core.towers.autoencoder import load_autoencoder
from sd3core.towers.text_encoders import load_text_encoders


@dataclass(frozen=True)
class PrecisionDifference:
    """Of vectors: the cosine between the two, and the length of the difference as a part of the vector's."""

    mean_cosine: float
    least_cosine: float
    mean_error: float
    most_error: float

    @staticmethod
    def of(exact: Tensor, other: Tensor) -> PrecisionDifference:
        """Both (..., W), along whose last axis a vector lies."""
        exact, other = exact.double().flatten(0, -2), other.double().flatten(0, -2)
        cosine = torch.cosine_similarity(exact, other, dim=-1)
        error = (other - exact).norm(dim=-1) / exact.norm(dim=-1)
        return PrecisionDifference(cosine.mean().item(), cosine.min().item(), error.mean().item(), error.max().item())


@torch.no_grad()
def text_differences(
    folder: Path | str, text: Text, captions: Sequence[str], device: torch.device | str = "cpu"
) -> dict[str, PrecisionDifference]:
    """By what the encoders give: each token of a sequence, and the pooled vectors, are the vectors."""
    features = []
    for dtype in (torch.float32, torch.bfloat16):
        features.append(load_text_encoders(folder, text, dtype, device).encode(captions).to("cpu"))
    names = (*ENCODERS, "clip_l_pooled", "clip_g_pooled")
    return {name: PrecisionDifference.of(*(getattr(of, name) for of in features)) for name in names}


@torch.no_grad()
def latent_difference(folder: Path | str, images: Tensor, device: torch.device | str = "cpu") -> PrecisionDifference:
    """Of images (B, 3, H, W) in [-1, 1]: each whole latent is a vector."""
    latents = [
        load_autoencoder(folder, dtype, device).encode(images).to("cpu") for dtype in (torch.float32, torch.bfloat16)
    ]
    return PrecisionDifference.of(*(latent.flatten(1) for latent in latents))
