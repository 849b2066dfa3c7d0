"""The parts of the MM-DiT. Parameter names are those of the released single-file checkpoints.

Shapes: B batch, L tokens, Lc text tokens, Lx image tokens, H hidden size, n heads, d channels of a head (64).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PLAIN_ATTENTION_TOKENS = 512  # up to here the CPU's fused bf16 attention loses to two matmuls
SINUSOID_CHANNELS = 256
MLP_RATIO = 4


def timestep_sinusoid(t: Tensor) -> Tensor:
    """[cos(1000 t f_i) | sin(1000 t f_i)], f_i = 10000^(-i/128). t (B,) in [0, 1] -> (B, 256) float32."""
    half = SINUSOID_CHANNELS // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = 1000.0 * t.float().unsqueeze(1) * frequencies  # (B, 128), fp32: bf16 could not tell 999 from 1000
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift. x (B, L, H); shift, scale (B, H)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update. x, update (B, L, H); gate (B, H)."""
    return torch.addcmul(x, gate.unsqueeze(1), update)


class PatchEmbed(nn.Module):
    """Patches of the latent, row by row, each mapped to H channels. (B, C, h, w) -> (B, hp * wp, H)."""

    def __init__(self, patch_size: int, channels: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        return rearrange(self.proj(latent), "b d h w -> b (h w) d")


class VectorEmbed(nn.Module):
    """Linear, SiLU, Linear on one vector per sample: timestep sinusoid or pooled text. (B, width) -> (B, H)."""

    def __init__(self, width: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight over the channels of one head. (..., d) -> (..., d)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # An fp32 weight on a bf16 input would leave the fused path.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)


class AttentionWeights(nn.Module):
    """One stream's projections around the joint attention; the last text stream has no output projection."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None, output: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        if output:
            self.proj = nn.Linear(hidden_size, hidden_size)
        self.ln_q: nn.Module = nn.Identity()
        self.ln_k: nn.Module = nn.Identity()
        if qk_norm == "rms":
            self.insert_qk_norm()

    def insert_qk_norm(self) -> None:
        """Adds RMS norms of scale one for queries and keys, where the weights of this stream are."""
        weight = self.qkv.weight
        head_width = weight.shape[1] // self.num_heads
        self.ln_q = RMSNorm(head_width).to(device=weight.device, dtype=weight.dtype)
        self.ln_k = RMSNorm(head_width).to(device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b l (three n d) -> three b l n d", three=3, n=self.num_heads)
        return self.ln_q(q), self.ln_k(k), v  # (B, L, n, d) each


class Mlp(nn.Module):
    """Linear to 4H, GELU (tanh form), Linear back."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, MLP_RATIO * hidden_size)
        self.fc2 = nn.Linear(MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v without a mask. q (B, L, n, d); k, v (B, M, n, d) -> (B, L, H). Holds no weights.

    A module, so that a hook can look at queries and keys (see `max_attention_logit`) without a branch in the forward.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(z, "b l n d -> b n l d") for z in (q, k, v))
        short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= PLAIN_ATTENTION_TOKENS
        attend = plain_attention if short_on_cpu else F.scaled_dot_product_attention
        return rearrange(attend(q, k, v), "b n l d -> b l (n d)")


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same written out. On a CPU in bf16 the fused kernel's backward takes 2 to 10 times as long for short sequences."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, n, L, L)
    return logits.softmax(dim=-1) @ v


class StreamBlock(nn.Module):
    """One modality's weights of a joint block: adaptive layer norm, attention projections, MLP.

    `last` marks a text stream of the last block: nothing reads its output, so it only gives queries, keys and values.
    `dual` gives a second attention, of the stream with itself: SD3.5-medium has it for the image in its first blocks.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None, last: bool = False, dual: bool = False):
        super().__init__()
        self.last, self.dual = last, dual
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = AttentionWeights(hidden_size, num_heads, qk_norm, output=not last)
        if dual:
            self.attn2 = AttentionWeights(hidden_size, num_heads, qk_norm)
            self.attention2 = Attention()
        if not last:
            self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
            self.mlp = Mlp(hidden_size)
        self.chunks = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.chunks * hidden_size))

    def before_attention(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """x, with the second attention added where there is one; q, k, v (B, L, n, d); (B, H) each for `after_attention`.

        Both attentions read the same layer norm, each under its own modulation.
        """
        shift_attn, scale_attn, *rest = self.adaLN_modulation(y).chunk(self.chunks, dim=-1)
        normed = self.norm1(x)
        qkv = self.attn(modulate(normed, shift_attn, scale_attn))
        if self.dual:
            *rest, shift_attn2, scale_attn2, gate_attn2 = rest
            attended = self.attention2(*self.attn2(modulate(normed, shift_attn2, scale_attn2)))
            x = gated_add(x, gate_attn2, self.attn2.proj(attended))
        return x, qkv, tuple(rest)

    def after_attention(
        self, x: Tensor, attended: Tensor, gate_attn: Tensor, shift_mlp: Tensor, scale_mlp: Tensor, gate_mlp: Tensor
    ) -> Tensor:
        x = gated_add(x, gate_attn, self.attn.proj(attended))
        return gated_add(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class JointBlock(nn.Module):
    """Two streams with weights of their own that meet in one attention. Paper figure 2b.

    x (B, Lx, H), c (B, Lc, H), y (B, H) -> x, c. The last block leaves c as it is: nothing reads it.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: str | None, last: bool = False, dual: bool = False):
        super().__init__()
        self.context_block = StreamBlock(hidden_size, num_heads, qk_norm, last=last)
        self.x_block = StreamBlock(hidden_size, num_heads, qk_norm, dual=dual)
        self.attention = Attention()

    def forward(self, x: Tensor, c: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        c, qkv_c, modulation_c = self.context_block.before_attention(c, y)
        x, qkv_x, modulation_x = self.x_block.before_attention(x, y)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(qkv_c, qkv_x, strict=True))  # (B, Lc + Lx, n, d), text first
        attended = self.attention(q, k, v)  # (B, Lc + Lx, H)
        attended_c, attended_x = attended.split([c.shape[1], x.shape[1]], dim=1)
        x = self.x_block.after_attention(x, attended_x, *modulation_x)
        if not self.context_block.last:
            c = self.context_block.after_attention(c, attended_c, *modulation_c)
        return x, c


class FinalLayer(nn.Module):
    """Modulated layer norm, projection to patch pixels. (B, Lx, H), (B, H) -> (B, Lx, patch * patch * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))
