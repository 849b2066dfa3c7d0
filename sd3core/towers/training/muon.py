"""Muon for the small towers: momentum whose direction is made orthogonal.

So every direction of a weight matrix learns at the same pace.

For a gradient momentum G = U S V^T the step is nearly U V^T (Jordan et al. 2024), by three odd polynomials of degree
five, each the best for what the one before it gives (Amsel et al. 2025, arXiv:2505.16932). Five iterations of Jordan's
one polynomial learn no faster, and took a quarter of a small model's training step on a CPU.
Convolutions count as matrices (out, in * k * k). Vectors (biases, norms) go to Adam. On the small autoencoder it reaches in
60 steps what Adam reaches in several hundred, because flat pictures make Adam's problem badly conditioned; a small CLIP's loss falls
twice as fast.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sd3core.optim import orthogonalise
from sd3core.towers.training.schedule import ramp_and_fade

ADAM_SHARE = 0.1  # rate of what Adam learns, as a part of Muon's


class TowerMuon(Optimizer):
    """Muon for tensors of two or more dimensions. `lr` is the spectral size of a step, momentum is Nesterov's."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1.0 - group["momentum"])
                direction = orthogonalise(parameter.grad.lerp(average, group["momentum"]).flatten(1))
                tallness = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
                parameter.add_(direction.view_as(parameter), alpha=-group["lr"] * tallness)


class Descent:
    """A tower's whole training rule: Muon for matrices and convolutions, Adam for vectors, embeddings and the output head, and one
    course of rates over `steps` for both."""

    def __init__(self, model: nn.Module, learning_rate: float, steps: int) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {name for name, p in trained.items() if p.ndim >= 2 and not _is_table(name)}
        others = [p for name, p in trained.items() if name not in matrices]
        self.optimizers = [
            TowerMuon([trained[name] for name in trained if name in matrices], lr=learning_rate),
            Adam(others, lr=ADAM_SHARE * learning_rate, betas=(0.9, 0.98)),
        ]
        self.full_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.steps = steps
        self.taken = 0

    def step(self, loss: Tensor) -> None:
        factor = ramp_and_fade(self.taken, self.steps)
        for optimizer, rate in zip(self.optimizers, self.full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.taken += 1


def _is_table(name: str) -> bool:
    """Rows of these are looked up or scored one by one, so that no direction of the whole matrix means anything."""
    return any(part in name for part in ("embedding", "shared", "lm_head", "relative_attention_bias"))
