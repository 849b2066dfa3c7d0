"""QK-norm inserted into a trained model, and the attention logits that it bounds. Paper 5.3.2, figure 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.layers import Attention, Heads, QKNorms, RMSNorm, join

ModelInputs = tuple[Tensor, Tensor, Tensor, Tensor]  # latent, t, context, pooled


def insert_qk_norm(model: Backbone, inputs: ModelInputs | None = None) -> Backbone:
    """Gives every attention RMS norms of queries and keys, in place, and returns the model. Paper 5.3.2.

    Weights that were there stay as they are. A model that has QK-norm is returned unchanged.

    The paper says only that the norms can be inserted and that the model adapts quickly. Two readings:

    - Scales of one, as in a fresh model: every query and key gets length sqrt(d). Logits become sqrt(d) cos(q, k)
      instead of |q| |k| cos(q, k) / sqrt(d), so every attention gets the same sharpness, whatever it had.
    - With `inputs`, scales fitted to a forward pass of them (`fitted_scale`), so that q and k keep their mean size.

    How near is the first forward? A norm forgets the RMS of each token and head, and one scale serves all heads of a
    stream. Fitted, the relative error of q and of k is at most s / sqrt(1 + s^2), s = standard deviation / mean of
    those RMS: nothing where they are equal. A logit then errs by about its own size times that error, so small logits
    come out near and logits of ten and more do not. Measured on a trained depth-3 model (mean RMS about 1, s 0.2 to
    0.55, logits to 34): the velocity moves by 24 % with either reading, and the loss from 0.52 to 0.55. With its q and k
    halved: 8 % fitted, 28 % with scales of one; doubled, where neither is near, 41 and 36 %.
    """
    if model.config.qk_norm is None:
        for module in model.modules():
            if isinstance(module, QKNorms):
                module.insert_qk_norm()
        model.config = dataclasses.replace(model.config, qk_norm="rms")
        if inputs is not None:
            norms = dict(inserted_norms(model))
            with norms_passed_by(norms) as sums, torch.no_grad():
                model(*inputs)
            for name, norm in norms.items():
                norm.weight.data.copy_(fitted_scale(sums[name]))
    return model


def inserted_norms(model: nn.Module) -> Iterator[tuple[str, RMSNorm]]:
    """Every norm of queries or keys, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RMSNorm))


@contextmanager
def norms_passed_by(norms: dict[str, RMSNorm]) -> Iterator[dict[str, Tensor]]:
    """Inside, these norms return what they are given, and what `fitted_scale` needs is summed up. Yields the sums.

    name -> (2, d) float64: sums over tokens and heads of z^2 / rms(z) and of z^2 / rms(z)^2.
    """
    first = next(iter(norms.values())).weight
    sums = {name: torch.zeros(2, norm.width, dtype=torch.float64, device=first.device) for name, norm in norms.items()}

    def look_and_pass(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            z = inputs[0].float().flatten(0, -2)  # (B * L * n, d)
            z = z[z.isfinite().all(dim=-1)]  # a damaged sample spoils only itself
            rms = z.square().mean(dim=-1, keepdim=True).add(1e-6).sqrt()
            sums[name] += torch.stack([(z.square() / rms).sum(dim=0), (z / rms).square().sum(dim=0)])
            return inputs[0]

        return hook

    hooks = [norm.register_forward_hook(look_and_pass(name)) for name, norm in norms.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def fitted_scale(sums: Tensor) -> Tensor:
    """The scale w (d,) that minimises sum |z - w * z / rms(z)|^2: w = sum(z^2 / rms) / sum(z^2 / rms^2) per channel.

    A mean of rms(z), so within the range of its values. A channel in which nothing was seen gets one.
    """
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp_min(torch.finfo(sums.dtype).tiny), 1.0).float()


@torch.no_grad()
def max_attention_logit(model: nn.Module, latent: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """max |q k^T| / sqrt(d) of every attention in one forward pass of these inputs (paper figure 5). float32.

    -> (attentions,), in the order of the forward pass: one a block, and one more where a block has a second attention.
    Looks in through hooks that are gone afterwards; costs one attention matrix of one sample at a time.
    """
    maxima: list[Tensor] = []

    def record(module: nn.Module, streams: tuple[Heads, ...]) -> None:
        q, k, _ = join(streams)
        logits = (torch.einsum("n l d, n m d -> n l m", *pair) for pair in zip(q.float(), k.float(), strict=True))
        maxima.append(torch.stack([sample.abs().amax() for sample in logits]).amax() / q.shape[-1] ** 0.5)

    hooks = [m.register_forward_pre_hook(record) for m in model.modules() if isinstance(m, Attention)]
    try:
        model(latent, t, context, pooled)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maxima)
