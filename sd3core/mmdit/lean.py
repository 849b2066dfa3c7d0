"""The heavy steps of a block for a CPU: the same numbers as their plain forms, less kept for the backward pass, less time.

What is cheap to make again is made again: the modulated input of a linear layer from its normalised one, GELU's output
from its input, the weights of an attention from queries and keys. Work is cut into pieces that stay in a core's cache.
Under autocast the normalised input is rounded to bf16 before it is modulated; the plain form modulates in fp32.
A GPU takes the plain forms, which its compiler fuses.

Shapes as in `layers`: B batch, L tokens, H width, n heads, d channels of a head; S heads at a time, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

aten = torch.ops.aten

MIN_TOKENS = 128  # shorter sequences keep little anyway, and the calls would cost more than they save
PIECE_BYTES = 2**20  # of GELU's input in fp32, for each core: its second cache holds it
HEADS_BYTES = 2**21  # of the attention weights of the heads that are worked on at a time
KEYS_MULTIPLE = 32  # of bf16 values in a vector register: softmax over other lengths takes half as long again
LAYER_NORM_EPS = 1e-6
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift. x (B, L, H); shift, scale (B, H)."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def serves(x: Tensor, tokens_dim: int = 1) -> bool:
    """Whether these forms gain anything for x: on a CPU, uncompiled, and with enough tokens."""
    return x.device.type == "cpu" and x.shape[tokens_dim] >= MIN_TOKENS and not torch.compiler.is_compiling()


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(layer_norm(x) * (1 + scale) + shift). x (B, L, H); shift, scale (B, H); weight (K, H) -> (B, L, K)."""
    return _apply(_ModulatedLinear, x, shift, scale, *_autocast(weight, bias))


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(gelu(u)), tanh form. u (B, L, K); weight (H, K) -> (B, L, H)."""
    return _apply(_GeluLinear, u, *_autocast(weight, bias))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v. q (B, n, L, d); k, v (B, n, M, d) -> (B, n, L, d).

    For bf16: in fp32 PyTorch's fused attention is as fast. That one takes 1.2 to 1.9 times as long in bf16, and keeps the
    logits in fp32; here they are rounded (see common_part).
    """
    return _apply(_Attention, q, k, v)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a linear layer under autocast would compute with."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


def _apply(function: type[Function], *tensors: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # dtypes are settled: nothing inside is to be cast again
        return function.apply(*tensors)


class _ModulatedLinear(Function):
    """Keeps the normalised x in the weight's dtype, not x, nor what the linear layer is given."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed, _, per_deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, LAYER_NORM_EPS)
        normed, shift, scale = (z.to(weight.dtype) for z in (normed, shift, scale))
        ctx.save_for_backward(normed, per_deviation, shift, scale, weight)
        return F.linear(modulate(normed, shift, scale), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        normed, per_deviation, shift, scale, weight = ctx.saved_tensors
        d_weight, d_bias = _linear_gradients(grad, modulate(normed, shift, scale))
        d_modulated = grad @ weight  # (B, L, H)
        d_shift, d_scale = d_modulated.sum(dim=1), (d_modulated * normed).sum(dim=1)
        d_normed = d_modulated.mul_(1 + scale.unsqueeze(1))

        # The kernel's own formula, for an input of mean 0 and deviation 1: the normalised one; x's deviation comes after.
        mean, one = (torch.full_like(per_deviation, value, dtype=normed.dtype) for value in (0.0, 1.0))
        d_x, _, _ = aten.native_layer_norm_backward(
            d_normed, normed, normed.shape[-1:], mean, one, None, None, [True, False, False]
        )
        return d_x * per_deviation, d_shift, d_scale, d_weight, d_bias


class _GeluLinear(Function):
    """Keeps GELU's input, not its output."""

    @staticmethod
    def forward(ctx, u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        u = u.to(weight.dtype).contiguous()
        ctx.save_for_backward(u, weight)
        return F.linear(gelu(u), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        u, weight = ctx.saved_tensors
        activated, d_u = gelu_and_gradient(u, grad @ weight)
        return d_u, *_linear_gradients(grad, activated)


class _Attention(Function):
    """Keeps queries, keys and values; a few heads at a time, whose weights stay in the cache while one of them fits there."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        common = common_part(k)
        ctx.save_for_backward(q, k, v, common)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        pieces = _HeadPieces(q, k - common, v)
        for (q, k, v, out_piece), weights in pieces.zip_weights(out):  # (S, L, d), (S, M, d) twice, (S, L, d)
            torch.bmm(weights, v, out=out_piece)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, common = ctx.saved_tensors
        pieces = _HeadPieces(q, k - common, v)
        d_q, d_k, d_v = (torch.empty_like(z) for z in (pieces.q, pieces.k, pieces.v))
        d_weights = torch.empty_like(pieces.logits)
        for (q, k, v, g, dq, dk, dv), weights in pieces.zip_weights(grad.contiguous(), d_q, d_k, d_v):
            d = d_weights[: len(q)]  # (S, L, M)
            torch.bmm(weights.mT, g, out=dv)
            torch.bmm(g, v.mT, out=d)
            aten._softmax_backward_data.out(d, weights, -1, d.dtype, grad_input=d)
            torch.bmm(d, k, out=dq)
            torch.bmm(d.mT, q, out=dk)
        keys = pieces.keys
        return d_q.mul_(pieces.scale), d_k[:, :, :keys], d_v[:, :, :keys]


class _HeadPieces:
    """Queries (scaled), keys and values of all samples' heads, cut into pieces of as many heads as the cache holds.

    Keys and values are padded to a multiple of KEYS_MULTIPLE; the weights of the padding are 0.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.scale, self.keys = q.shape[-1] ** -0.5, k.shape[2]
        padding = -self.keys % KEYS_MULTIPLE
        self.q = q.contiguous() * self.scale
        self.k, self.v = (F.pad(z, (0, 0, 0, padding)) if padding else z.contiguous() for z in (k, v))
        matrix = (q.shape[2], self.keys + padding)
        self.heads = min(max(1, HEADS_BYTES // (math.prod(matrix) * q.element_size())), len(q) * q.shape[1])
        self.logits, self.weights = torch.empty(2, self.heads, *matrix, dtype=q.dtype)

    def zip_weights(self, *others: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Pieces of q, k, v and of `others`, all (B, n, ...), and the softmax of each: one buffer, overwritten by the next."""
        split = (z.flatten(0, 1).split(self.heads) for z in (self.q, self.k, self.v, *others))
        for piece in zip(*split, strict=True):
            q, k, *_ = piece
            logits, weights = self.logits[: len(q)], self.weights[: len(q)]
            torch.bmm(q, k.mT, out=logits)
            logits[:, :, self.keys :] = -torch.inf
            torch.softmax(logits, dim=-1, out=weights)
            yield piece, weights


def common_part(k: Tensor) -> Tensor:
    """The mean over the keys, in channels where it is larger than their deviation; else 0. k (B, n, M, d) -> (B, n, 1, d).

    Taking it off the keys moves all logits of a query alike, so the softmax and every gradient stay what they are, and bf16
    has more places for the rest: a channel that is large in all keys, as trained models have them, would cost the weights a
    decimal place.
    """
    mean, mean_square = k.mean(dim=2, keepdim=True), k.square().mean(dim=2, keepdim=True)
    return torch.where(2 * mean.square() > mean_square, mean, 0.0)


def gelu(u: Tensor) -> Tensor:
    """u * sigmoid(z(u)), z(u) = 2 sqrt(2 / pi) (u + 0.044715 u^3): the tanh form, by 1 + tanh(z / 2) = 2 sigmoid(z).

    Computed in fp32. PyTorch's kernel takes twice as long, its vector tanh being three times as dear as its sigmoid.
    """
    out = torch.empty_like(u)
    for x, piece in zip(_pieces(u), _pieces(out), strict=True):
        x = _at_least_fp32(x)
        piece.copy_(_gelu_logit(x).sigmoid_().mul_(x))
    return out


def gelu_and_gradient(u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u), and gelu'(u) * grad, for which grad is overwritten. PyTorch's kernel takes as long for the latter alone.

    gelu'(u) = s + s (1 - s) u z'(u), s = sigmoid(z), u z'(u) = 3 z - 2 GELU_SLOPE u.
    """
    out = torch.empty_like(u)
    for x, g, piece in zip(_pieces(u), _pieces(grad), _pieces(out), strict=True):
        x = _at_least_fp32(x)
        z = _gelu_logit(x)
        s = z.sigmoid()
        piece.copy_(x * s)
        third = z.sub_(x, alpha=2 * GELU_SLOPE / 3)  # of u z'(u)
        aten.sigmoid_backward.grad_input(third, s, grad_input=third)  # * s (1 - s)
        g.copy_(s.add_(third, alpha=3).mul_(g))
    return out, grad


def _gelu_logit(x: Tensor) -> Tensor:
    slope = torch.tensor(GELU_SLOPE, dtype=x.dtype)
    return torch.addcmul(slope, x, x, value=GELU_SLOPE * GELU_CUBIC).mul_(x)


def _pieces(z: Tensor) -> tuple[Tensor, ...]:
    """Rows of (..., K) in pieces that are PIECE_BYTES in fp32 for each thread."""
    return z.view(-1, z.shape[-1]).split(max(1, torch.get_num_threads() * PIECE_BYTES // (4 * z.shape[-1])))


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of weight and bias: grad (B, L, K), x (B, L, H) -> (K, H), (K,)."""
    rows = grad.flatten(0, 1)
    return rows.T @ x.flatten(0, 1), rows.sum(dim=0)
