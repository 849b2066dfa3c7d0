"""The heavy steps of a block for a CPU: the same numbers, less memory and time.

What is cheap to make again is made again: the modulated input of a linear layer from its normalised one, GELU's output
from its input, the weights of an attention from queries and keys. What is done number by number is compiled into one pass
over its tensors, products are left to the library, and an attention's work is cut into pieces that stay in a core's cache.
Under autocast the normalised input is rounded to bf16 before it is modulated; the plain form modulates in fp32.
A GPU takes the plain forms, which its compiler fuses. A model has them put in from outside, by `use_lean_steps`.

Shapes as in `layers`: B batch, L tokens, H width, n heads, d channels of a head; S heads at a time, M keys.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from sd3core.mmdit.layers import (
    LAYER_NORM_EPS,
    Attention,
    GatedAdd,
    GeluLinear,
    Heads,
    ModulatedLinear,
    join,
    modulate,
    split,
)

log = logging.getLogger(__name__)

MIN_TOKENS = 128  # shorter sequences keep little anyway, and the calls would cost more than they save
PLAIN_ATTENTION_TOKENS = 512  # up to here the CPU's fused bf16 attention loses to two matmuls
MIN_FUSED = 2**16  # numbers of a tensor: for fewer, compiling does not pay
HEADS_BYTES = 2**21  # of the attention weights of the heads that are worked on at a time
KEYS_MULTIPLE = 32  # of bf16 values in a vector register: softmax over other lengths takes half as long again
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
GELU_SATURATED = 30.0  # from here on the sigmoid is 0 or 1 to the last bit, also in fp64


@functools.cache
def can_compile() -> bool:
    """Whether PyTorch can compile for this machine's CPU. Tried once; where it cannot, the steps run as they are written."""
    try:
        _compiled(torch.neg)(torch.zeros(1))
    except Exception as error:  # no C++ compiler, or a folder for its output that may not be written
        why = str(error).strip().splitlines()[0]
        log.warning("this CPU computes a model's blocks uncompiled, which takes longer: install g++ (%s)", why)
        return False
    return True


@functools.cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    # Compiled in this process, so that no pool of compilers stays behind, and for any number of threads, since what was
    # compiled is found again by processes that have another.
    return torch.compile(plain, options={"compile_threads": 1, "cpp.dynamic_threads": True})


def _fused(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`plain` in one pass over its tensors, of which the first, or the first list of them, decides whether that pays."""

    @functools.wraps(plain)
    def call(x: Tensor | Sequence[Tensor], *others: Any) -> Any:
        size = x.numel() if isinstance(x, Tensor) else sum(z.numel() for z in x)
        fuses = size >= MIN_FUSED and not torch.compiler.is_compiling() and can_compile()
        return (_compiled(plain) if fuses else plain)(x, *others)

    return call


def applies_to(x: Tensor, tokens: int | None = None) -> bool:
    """Whether these forms gain anything for x (B, L, ...): on a CPU, uncompiled, and with enough tokens, L or as given."""
    enough = (x.shape[1] if tokens is None else tokens) >= MIN_TOKENS
    return x.device.type == "cpu" and enough and not torch.compiler.is_compiling()


class LeanModulatedLinear(ModulatedLinear):
    """A modulated linear layer that takes the lean form where that gains anything."""

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        if applies_to(x):
            return modulated_linear(x, shift, scale, self.weight, self.bias)
        return super().forward(x, shift, scale)


class LeanGeluLinear(GeluLinear):
    """A linear layer after GELU that takes the lean form where that gains anything."""

    def forward(self, u: Tensor) -> Tensor:
        return gelu_linear(u, self.weight, self.bias) if applies_to(u) else super().forward(u)


class LeanGatedAdd(GatedAdd):
    """A gated sum that takes the lean form where that gains anything."""

    def forward(self, x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        return gated_add(x, gate, update) if applies_to(x) else super().forward(x, gate, update)


class LeanAttention(Attention):
    """An attention that takes, for bf16 on a CPU, the lean form for long sequences and two products for short ones."""

    def forward(self, *streams: Heads) -> tuple[Tensor, ...]:
        first, tokens = streams[0][0], sum(q.shape[2] for q, _, _ in streams)
        if first.device.type != "cpu" or first.dtype != torch.bfloat16:
            return super().forward(*streams)
        if applies_to(first, tokens):
            return attention(*streams)
        if tokens <= PLAIN_ATTENTION_TOKENS:
            return split(plain_attention(*join(streams)), streams)
        return super().forward(*streams)


LEAN_FORMS = {
    ModulatedLinear: LeanModulatedLinear,
    GeluLinear: LeanGeluLinear,
    GatedAdd: LeanGatedAdd,
    Attention: LeanAttention,
}


def use_lean_steps(model: nn.Module) -> None:
    """Has the model's blocks take the lean forms from now on. Weights, their names and hooks stay as they are."""
    for module in model.modules():
        module.__class__ = LEAN_FORMS.get(type(module), type(module))


def modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(layer_norm(x) * (1 + scale) + shift). x (B, L, H); shift, scale (B, H); weight (K, H) -> (B, L, K)."""
    return _apply(_ModulatedLinear, x, shift, scale, *_autocast(weight, bias))


def gelu_linear(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """linear(gelu(u)), tanh form. u (B, L, K); weight (H, K) -> (B, L, H)."""
    return _apply(_GeluLinear, u, *_autocast(weight, bias))


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate * update. x, update (B, L, H); gate (B, H)."""
    return _apply(_GatedAdd, x, gate, update)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention written out. On a CPU in bf16 the fused kernel's backward takes 2 to 10 times as long for short sequences."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, n, L, L)
    return logits.softmax(dim=-1) @ v


def attention(*streams: Heads) -> tuple[Tensor, ...]:
    """softmax(q k^T / sqrt(d)) v, where each stream's queries look at the keys of all.

    Of each stream q (B, n, L, d); k, v (B, n, M, d) -> its (B, L, n * d).

    For bf16: in fp32 PyTorch's fused attention is as fast. That one takes 1.2 to 1.9 times as long in bf16, and keeps the
    logits in fp32; here they are rounded (see common_part).
    """
    return _apply(_Attention, *(z for stream in streams for z in stream))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What a linear layer under autocast would compute with."""
    if not torch.is_autocast_enabled("cpu"):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)


def _apply(function: type[Function], *tensors: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):  # dtypes are settled: nothing inside is to be cast again
        return function.apply(*tensors)


class _ModulatedLinear(Function):
    """Keeps the normalised x in the weight's dtype, not x, nor what the linear layer is given."""

    @staticmethod
    def forward(ctx, x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed, per_deviation, modulated = _normed_and_modulated(x, shift, scale, weight.dtype)
        ctx.save_for_backward(normed, per_deviation, shift, scale, weight)
        ctx.dtype = x.dtype
        return F.linear(modulated, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        normed, per_deviation, shift, scale, weight = ctx.saved_tensors
        d_weight, d_bias = _linear_gradients(grad, _modulated(normed, shift, scale))
        d_x, d_shift, d_scale = _modulated_backward(grad @ weight, normed, per_deviation, scale, ctx.dtype)
        return d_x, d_shift, d_scale, d_weight, d_bias


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


class _GatedAdd(Function):
    """Keeps what the plain form keeps; both gradients of the product come from one pass."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(gate, update)
        return torch.addcmul(x, gate.unsqueeze(1), update)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        gate, update = ctx.saved_tensors
        return grad, *_gated_backward(grad, gate, update)


class _Attention(Function):
    """Keeps queries, keys and values as it multiplies them, and of the weights each query's log-sum. A few heads' weights
    are made at a time, which stay in the cache while those of one head fit there.
    """

    @staticmethod
    def forward(ctx, *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.lengths = [[z.shape[2] for z in heads[i::3]] for i in range(3)]  # of each stream's queries, keys, values
        queries, keys, _ = ctx.lengths
        prepared = _prepared(heads[0::3], heads[1::3], heads[2::3], -sum(keys) % KEYS_MULTIPLE)
        out = torch.empty_like(prepared[0])
        log_sum = _at_least_fp32(out.new_empty(*out.shape[:-1], 1))
        for (_, _, v, out_piece, log_sum_piece), logits, weights in _zip_logits(prepared, sum(keys), out, log_sum):
            _softmax_into(weights, logits, log_sum_piece)  # (S, L, M)
            torch.bmm(weights, v, out=out_piece)
        ctx.save_for_backward(*prepared, log_sum)
        return tuple(z.transpose(1, 2).flatten(2) for z in out.split(queries, dim=2))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, ...]:
        *prepared, log_sum = ctx.saved_tensors
        grad = torch.cat([z.unflatten(2, (prepared[0].shape[1], -1)).transpose(1, 2) for z in grads], dim=2)
        d_heads = [torch.empty_like(z) for z in prepared]
        scale = grad.shape[-1] ** -0.5
        pieces = _zip_logits(prepared, sum(ctx.lengths[1]), log_sum, grad.contiguous(), *d_heads)
        for (q, k, v, log_sum, g, dq, dk, dv), logits, d in pieces:
            torch.bmm(g, v.mT, out=d)  # (S, L, M)
            _weights_and_gradient(logits, d, log_sum)
            torch.bmm(logits.mT, g, out=dv)
            torch.baddbmm(dq, d, k, beta=0, alpha=scale, out=dq)
            torch.bmm(d.mT, q, out=dk)
        of_streams = (z[:, :, : sum(n)].split(n, dim=2) for z, n in zip(d_heads, ctx.lengths, strict=True))
        return tuple(z for stream in zip(*of_streams, strict=True) for z in stream)


def _zip_logits(
    prepared: Sequence[Tensor], keys: int, *others: Tensor
) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Pieces of q, k, v and of `others`, all (B, n, ...), of as many heads as the cache holds; the logits of each (S, L, M);
    and room of their size. The next piece overwrites both.
    """
    q, k, _ = prepared
    matrix = (q.shape[2], k.shape[2])
    heads = min(max(1, HEADS_BYTES // (math.prod(matrix) * q.element_size())), len(q) * q.shape[1])
    all_logits, all_room = (torch.empty(heads, *matrix, dtype=q.dtype) for _ in range(2))
    for piece in zip(*(z.flatten(0, 1).split(heads) for z in (*prepared, *others)), strict=True):
        q, k, *_ = piece
        logits, room = all_logits[: len(q)], all_room[: len(q)]
        torch.bmm(q, k.mT, out=logits)
        logits[:, :, keys:] = -torch.inf
        yield piece, logits, room


@_fused
def _softmax_into(weights: Tensor, logits: Tensor, log_sum: Tensor) -> None:
    """The softmax of the logits (S, L, M), and log(sum(exp(logits))) (S, L, 1)."""
    wide = _at_least_fp32(logits)
    largest = wide.amax(dim=-1, keepdim=True)
    powers = (wide - largest).exp()
    total = powers.sum(dim=-1, keepdim=True)
    weights.copy_(powers / total)
    log_sum.copy_(largest + total.log())


@_fused
def _weights_and_gradient(logits: Tensor, d: Tensor, log_sum: Tensor) -> None:
    """The logits become their softmax, and its gradient d becomes the logits'."""
    weights, wide = (_at_least_fp32(logits) - log_sum).exp(), _at_least_fp32(d)
    d.copy_(weights * (wide - (weights * wide).sum(dim=-1, keepdim=True)))
    logits.copy_(weights)


@_fused
def _prepared(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The streams joined: queries scaled; keys without what they have in common; keys and values with zeros behind them."""
    zeros = v[0].new_zeros(*v[0].shape[:2], padding, v[0].shape[3])
    common = common_part(k)
    k = [(_at_least_fp32(z) - common).to(z.dtype) for z in k]
    q = [z * z.shape[-1] ** -0.5 for z in q]
    return tuple(torch.cat(parts, dim=2).contiguous() for parts in (q, [*k, zeros], [*v, zeros]))


def common_part(keys: Sequence[Tensor]) -> Tensor:
    """The mean over all keys, in channels where it is larger than their deviation; else 0. (B, n, M, d) each -> (B, n, 1, d).

    Taking it off the keys moves all logits of a query alike, so the softmax and every gradient stay what they are, and bf16
    has more places for the rest: a channel that is large in all keys, as trained models have them, would cost the weights a
    decimal place.
    """
    wide, per_key = [_at_least_fp32(k) for k in keys], 1 / sum(k.shape[2] for k in keys)
    # compiled, it is made again for every key: no division
    mean = sum(k.sum(dim=2, keepdim=True) for k in wide) * per_key
    mean_square = sum(k.square().sum(dim=2, keepdim=True) for k in wide) * per_key
    return torch.where(2 * mean.square() > mean_square, mean, 0.0)


@_fused
def _normed_and_modulated(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm of x, rounded to dtype; 1 / its deviation, (B, L, 1); and the former modulated."""
    wide = _at_least_fp32(x)
    centred = wide - wide.mean(dim=-1, keepdim=True)
    per_deviation = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + LAYER_NORM_EPS)
    normed = (centred * per_deviation).to(dtype)
    return normed, per_deviation, _modulate(normed, shift, scale)


def _modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    wide = (_at_least_fp32(z) for z in (normed, shift, scale))
    return modulate(*wide).to(normed.dtype)


_modulated = _fused(_modulate)


@_fused
def _modulated_backward(
    d_modulated: Tensor, normed: Tensor, per_deviation: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, in dtype, of shift and of scale."""
    d, n, factor = (_at_least_fp32(z) for z in (d_modulated, normed, 1 + scale))
    d_shift, d_scale = d.sum(dim=1), (d * n).sum(dim=1)
    d = d * factor.unsqueeze(1)
    d_x = (d - d.mean(dim=-1, keepdim=True) - n * (d * n).mean(dim=-1, keepdim=True)) * per_deviation
    return d_x.to(dtype), d_shift.to(scale.dtype), d_scale.to(scale.dtype)


@_fused
def _gated_backward(grad: Tensor, gate: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and update."""
    d, wide = _at_least_fp32(grad), _at_least_fp32(update)
    return (d * wide).sum(dim=1).to(gate.dtype), (d * gate.unsqueeze(1)).to(update.dtype)


@_fused
def gelu(u: Tensor) -> Tensor:
    """u / (1 + exp(-z(u))), z(u) = 2 sqrt(2 / pi) (u + 0.044715 u^3): the tanh form, by 1 + tanh(z / 2) = 2 sigmoid(z).

    Computed in fp32. A vector tanh is three times as dear as an exponential. Where u^3 overflows, so does exp, or it is 0.
    """
    x = _at_least_fp32(u)
    return (x / (1 + (-_gelu_logit(x)).exp())).to(u.dtype)


@_fused
def gelu_and_gradient(u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u), and gelu'(u) * grad. gelu'(u) = s + s (1 - s) u z'(u), s = sigmoid(z), u z'(u) = 3 z - 2 GELU_SLOPE u."""
    x = _at_least_fp32(u)
    near = x.clamp(-GELU_SATURATED, GELU_SATURATED)  # farther out s stays as it is, and 0 * inf would be nan
    z = _gelu_logit(near)
    s = z.sigmoid()
    slope = s + s * (1 - s) * (3 * z - 2 * GELU_SLOPE * near)
    return (x * s).to(u.dtype), (slope * grad).to(grad.dtype)


def _gelu_logit(x: Tensor) -> Tensor:
    return x * (GELU_SLOPE + GELU_SLOPE * GELU_CUBIC * x.square())


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _linear_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias: grad (B, L, K), x (B, L, H) -> (K, H), (K,)."""
    rows = grad.flatten(0, 1)
    return rows.T @ x.flatten(0, 1), rows.sum(dim=0)
