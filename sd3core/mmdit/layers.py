"""The parts of MM-DiT and its rivals. MM-DiT's parameter names are those of the released single-file checkpoints.

Shapes: B batch, L tokens, Lc text tokens, Lx image tokens, H hidden size, n heads, d channels of a head (64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Heads = tuple[Tensor, Tensor, Tensor]  # a stream's queries (B, n, L, d), keys and values (B, n, M, d)
SINUSOID_CHANNELS = 256
LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4


def timestep_sinusoid(t: Tensor) -> Tensor:
    """[cos(1000 t f_i) | sin(1000 t f_i)], f_i = 10000^(-i/128). t (B,) in [0, 1] -> (B, 256) float32."""
    half = SINUSOID_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = 1000.0 * t.float().unsqueeze(1) * frequencies  # (B, 128), fp32: bf16 could not tell 999 from 1000
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def layer_norm(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) over the last dimension, without weights of its own."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift. x (B, L, H); shift, scale (B, H)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class PatchEmbed(nn.Module):
    """Patches of the latent, row by row, each mapped to H channels. (B, C, h, w) -> (B, hp * wp, H)."""

    def __init__(self, patch_size: int, channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        # The residual stream has this layout to its end, and a channel's tokens in a row would make each step slower.
        return rearrange(self.proj(latent), "b d h w -> b (h w) d").contiguous()


class VectorEmbed(nn.Module):
    """Linear, SiLU, Linear on one vector per sample: timestep sinusoid or pooled text. (B, width) -> (B, H)."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class GatedAdd(nn.Module):
    """x + gate * update. x, update (B, L, H); gate (B, H). Holds no weights."""

    def forward(self, x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        return torch.addcmul(x, gate.unsqueeze(1), update)


class ModulatedLinear(nn.Linear):
    """linear(modulate(layer_norm(x), shift, scale)). x (B, L, H); shift, scale (B, H) -> (B, L, K)."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return super().forward(modulate(layer_norm(x), shift, scale))


class GeluLinear(nn.Linear):
    """linear(gelu(u)), GELU in its tanh form. (B, L, K) -> (B, L, H)."""

    def forward(self, u: Tensor) -> Tensor:
        return super().forward(F.gelu(u, approximate="tanh"))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the channels of one head. (..., d) -> (..., d)."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # An fp32 weight on a bf16 input would leave the fused path.
        return F.rms_norm(x, (self.width,), self.weight.to(x.dtype), eps=1e-6)


class QKNorms(nn.Module):
    """The norms of queries and keys, per head and before the attention: none, or RMS norms."""

    def __init__(self, head_width: int, qk_norm: str | None):
        super().__init__()
        self.head_width = head_width
        self.ln_q: nn.Module = nn.Identity() if qk_norm is None else RMSNorm(head_width)
        self.ln_k: nn.Module = nn.Identity() if qk_norm is None else RMSNorm(head_width)

    def insert_qk_norm(self) -> None:
        """Adds RMS norms of scale one, where the weights of this attention are."""
        like = next(self.parameters())
        self.ln_q = RMSNorm(self.head_width).to(like)
        self.ln_k = RMSNorm(self.head_width).to(like)


class AttentionWeights(QKNorms):
    """One stream's projections around an attention; the last text stream has no output projection.

    x (B, L, H), not yet normed, shift and scale (B, H) -> q, k, v (B, n, L, d).
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None, output: bool = True):
        super().__init__(hidden_size // num_heads, qk_norm)
        self.num_heads = num_heads
        self.qkv = ModulatedLinear(hidden_size, 3 * hidden_size)
        if output:
            self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Heads:
        qkv = rearrange(self.qkv(x, shift, scale), "b l (three n d) -> b l three n d", three=3, n=self.num_heads)
        q, k, v = (rearrange(z, "b l n d -> b n l d") for z in qkv.unbind(2))
        return self.ln_q(q), self.ln_k(k), v


class CrossAttention(QKNorms):
    """Image tokens look at text tokens. x (B, Lx, H), c (B, Lc, H) -> (B, Lx, H)."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None):
        super().__init__(hidden_size // num_heads, qk_norm)
        self.num_heads = num_heads
        self.q = nn.Linear(hidden_size, hidden_size)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.attention = Attention()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b l (n d) -> b n l d", n=self.num_heads)
        k, v = rearrange(self.kv(c), "b l (two n d) -> two b n l d", two=2, n=self.num_heads)
        (attended,) = self.attention((self.ln_q(q), self.ln_k(k), v))
        return self.proj(attended)


class Mlp(nn.Module):
    """Modulated layer norm, Linear to 4H, GELU (tanh form), Linear back. x (B, L, H); shift, scale (B, H) -> (B, L, H)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = ModulatedLinear(hidden_size, MLP_RATIO * hidden_size)
        self.fc2 = GeluLinear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, shift, scale))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v without a mask, where each stream's queries look at the keys of all. Holds no weights.

    Heads of each stream -> its (B, L, H). A module, so that a hook can look at queries and keys (see `max_attention_logit`)
    without a branch in the forward.
    """

    def forward(self, *streams: Heads) -> tuple[Tensor, ...]:
        return split(F.scaled_dot_product_attention(*join(streams)), streams)


def join(streams: Sequence[Heads]) -> Heads:
    """The streams one after the other, as one attention sees them."""
    return streams[0] if len(streams) == 1 else tuple(torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))


def split(attended: Tensor, streams: Sequence[Heads]) -> tuple[Tensor, ...]:
    """What all queries attended to, (B, n, L, d) -> each stream's part, (B, L, H)."""
    parts = attended.split([q.shape[2] for q, _, _ in streams], dim=2)
    return tuple(rearrange(part, "b n l d -> b l (n d)") for part in parts)


class StreamBlock(nn.Module):
    """One modality's weights of a joint block: adaptive layer norm, attention projections, MLP.

    `last` marks a text stream of the last block: nothing reads its output, so it only gives queries, keys and values.
    `dual` gives a second attention, of the stream with itself: SD3.5-medium has it for the image in its first blocks.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None, last: bool = False, dual: bool = False):
        super().__init__()
        self.last, self.dual = last, dual
        self.gated_add = GatedAdd()
        self.attn = AttentionWeights(hidden_size, num_heads, qk_norm, output=not last)
        if dual:
            self.attn2 = AttentionWeights(hidden_size, num_heads, qk_norm)
            self.attention2 = Attention()
        if not last:
            self.mlp = Mlp(hidden_size)
        self.chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.chunks * hidden_size))

    def before_attention(self, x: Tensor, y: Tensor) -> tuple[Tensor, Heads, tuple[Tensor, ...]]:
        """x, with the second attention added where there is one; its heads; (B, H) each for `after_attention`.

        Both attentions read the same x, each under its own modulation.
        """
        shift_attn, scale_attn, *rest = self.adaLN_modulation(y).chunk(self.chunks, dim=-1)
        qkv = self.attn(x, shift_attn, scale_attn)
        if self.dual:
            *rest, shift_attn2, scale_attn2, gate_attn2 = rest
            (attended,) = self.attention2(self.attn2(x, shift_attn2, scale_attn2))
            x = self.gated_add(x, gate_attn2, self.attn2.proj(attended))
        return x, qkv, tuple(rest)

    def after_attention(self, x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """x and what it attended to -> the stream, all (B, L, H)."""
        if self.last:
            return x
        gate_attn, *modulation_mlp = modulation
        x = self.gated_add(x, gate_attn, self.attn.proj(attended))
        return self.add_mlp(x, *modulation_mlp)

    def add_mlp(self, x: Tensor, shift_mlp: Tensor, scale_mlp: Tensor, gate_mlp: Tensor) -> Tensor:
        return self.gated_add(x, gate_mlp, self.mlp(x, shift_mlp, scale_mlp))


class JointBlock(nn.Module):
    """Streams with weights of their own that meet in one attention: text and image, or CLIP, T5 and image. Paper figure 2b.

    x (B, Lx, H), c (B, Lc, H), y (B, H) -> x, c. The last block leaves c as it is: nothing reads it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qk_norm: str | None,
        last: bool = False,
        dual: bool = False,
        clip_tokens: int | None = None,
    ):
        super().__init__()
        self.clip_tokens = clip_tokens
        self.context_block = StreamBlock(hidden_size, num_heads, qk_norm, last=last)
        if clip_tokens is not None:
            self.t5_block = StreamBlock(hidden_size, num_heads, qk_norm, last=last)
        self.x_block = StreamBlock(hidden_size, num_heads, qk_norm, dual=dual)
        self.attention = Attention()

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.clip_tokens is None:
            blocks, streams = [self.context_block, self.x_block], [c, x]
        else:
            blocks = [self.context_block, self.t5_block, self.x_block]
            streams = [*c.tensor_split([self.clip_tokens], dim=1), x]

        before = [block.before_attention(z, y) for block, z in zip(blocks, streams, strict=True)]
        attended = self.attention(*(heads for _, heads, _ in before))  # (B, L, H) each
        *text, x = (
            block.after_attention(z, part, modulation)
            for block, part, (z, _, modulation) in zip(blocks, attended, before, strict=True)
        )
        return x, text[0] if len(text) == 1 else torch.cat(text, dim=1)


class SelfBlock(StreamBlock):
    """One stream with an attention of its own: DiT's block. x (B, L, H), y (B, H) -> x."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None):
        super().__init__(hidden_size, num_heads, qk_norm)
        self.attention = Attention()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, heads, modulation = self.before_attention(x, y)
        (attended,) = self.attention(heads)
        return self.after_attention(x, attended, modulation)


class CrossBlock(SelfBlock):
    """DiT's block with a look at the text between attention and MLP, neither normed nor gated, as in PixArt-alpha.

    x (B, Lx, H), c (B, Lc, H), y (B, H) -> x.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None):
        super().__init__(hidden_size, num_heads, qk_norm)
        self.cross = CrossAttention(hidden_size, num_heads, qk_norm)

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> Tensor:
        x, heads, (gate_attn, *modulation_mlp) = self.before_attention(x, y)
        (attended,) = self.attention(heads)
        x = self.gated_add(x, gate_attn, self.attn.proj(attended))
        x = x + self.cross(x, c)
        return self.add_mlp(x, *modulation_mlp)


class FinalLayer(nn.Module):
    """Modulated layer norm, projection to patch pixels. (B, Lx, H), (B, H) -> (B, Lx, patch * patch * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int):
        super().__init__()
        self.linear = ModulatedLinear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(x, shift, scale)
