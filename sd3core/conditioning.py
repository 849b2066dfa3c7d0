"""What the MM-DiT is told about a caption, and how encoders are left out.

Paper App. B.2: context = [pad(clip_l | clip_g), pad(t5)] along tokens, CLIP first, padded with zeros on channels;
pooled = clip_l_pooled | clip_g_pooled. App. B.3: in training each encoder's outputs are dropped on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sd3core.randomness import uniforms
from sd3core.recipe import ENCODERS


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """The three encoders' outputs for a batch of captions.

    Tc and Tt are the recipe's text.clip_tokens and text.t5_tokens. `lengths` counts the real tokens (begin and end marks
    included) of clip_l, clip_g and t5; with padding "trimmed" whatever lies beyond them is zero.
    """

    clip_l: Tensor  # (B, Tc, Wl)
    clip_g: Tensor  # (B, Tc, Wg)
    t5: Tensor  # (B, Tt, W5)
    clip_l_pooled: Tensor  # (B, Wl)
    clip_g_pooled: Tensor  # (B, P)
    lengths: Tensor  # (B, 3) int64

    def __len__(self) -> int:
        return len(self.clip_l)

    def to(self, *target: torch.device | torch.dtype | str) -> TextFeatures:
        """Another device or dtype, as Tensor.to takes them; `lengths` keeps its dtype."""
        features = {f.name: getattr(self, f.name).to(*target) for f in fields(self)}
        return TextFeatures(**features | {"lengths": features["lengths"].to(torch.int64)})

    def trimmed(self) -> TextFeatures:
        """These features with zeros after each caption's real tokens."""
        kept = {}
        for column, name in enumerate(ENCODERS):
            sequence = getattr(self, name)  # (B, T, W)
            # (B, T)
            real = torch.arange(sequence.shape[1], device=sequence.device) < self.lengths[:, column : column + 1]
            kept[name] = torch.where(real[..., None], sequence, 0)
        return TextFeatures(
            **kept, clip_l_pooled=self.clip_l_pooled, clip_g_pooled=self.clip_g_pooled, lengths=self.lengths
        )


def join_features(
    features: TextFeatures, keep: Tensor | None = None, null: TextFeatures | None = None, context_dim: int = 4096
) -> tuple[Tensor, Tensor]:
    """(context (B, Tc + Tt, context_dim), pooled (B, Wl + P)): CLIP tokens first, then T5.

    keep (B, 3) bool, in the order of ENCODERS: False replaces that encoder's sequence and pooled vector by zeros, or by those
    of `null` (a batch of one: the encoded empty string). The result has the features' dtype.
    """
    parts = {f.name: getattr(features, f.name) for f in fields(features)}
    if keep is not None:
        columns = {"clip_l": 0, "clip_l_pooled": 0, "clip_g": 1, "clip_g_pooled": 1, "t5": 2}
        for name, column in columns.items():
            part = parts[name]
            kept = keep[:, column].to(part.device).view(-1, *[1] * (part.ndim - 1))
            absent = torch.zeros_like(part) if null is None else getattr(null, name).to(part)
            parts[name] = torch.where(kept, part, absent)
    clip = torch.cat([parts["clip_l"], parts["clip_g"]], dim=-1)  # (B, Tc, Wl + Wg)
    if max(clip.shape[-1], parts["t5"].shape[-1]) > context_dim:
        raise ValueError(
            f"context_dim {context_dim} is smaller than the encoders' widths"
            f" (CLIP {clip.shape[-1]}, T5 {parts['t5'].shape[-1]})"
        )
    sequences = [pad(sequence, (0, context_dim - sequence.shape[-1])) for sequence in (clip, parts["t5"])]
    pooled = torch.cat([parts["clip_l_pooled"], parts["clip_g_pooled"]], dim=-1)  # (B, Wl + P)
    return torch.cat(sequences, dim=1), pooled


def drop_mask(
    seed: int, epochs: int | np.ndarray, sample_ids: np.ndarray, each: float, together: float = 0.0
) -> Tensor:
    """(B, 3) bool, True = this encoder is dropped for this sample (assemble's keep = ~mask).

    Each on its own with probability `each` (the paper's only rule), and all three at once with probability `together`.

    A pure function of (seed, epoch, sample id): world size and restarts do not change it.
    """
    draws = uniforms(seed, epochs, sample_ids, "text_dropout", len(ENCODERS) + 1)
    return torch.from_numpy((draws[:, :-1] < each) | (draws[:, -1:] < together))
