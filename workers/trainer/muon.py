"""Muon on sharded weights: orthogonal steps for the matrices of the joint blocks, Adam for all else.

Jordan et al. 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982): a matrix's step has the root mean square 0.2 that Adam's
steps typically have, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sd3core.tower_training.muon import orthogonalise

STEP_RMS = 0.2


@dataclass(frozen=True)
class MatrixPiece:
    """Elements [start, start + length) of a matrix, at [offset, offset + length) of a flat partition of this rank.

    `split`: no rank holds the whole matrix. All ranks then put it together, also one that holds nothing of it (length 0).
    """

    shape: tuple[int, int]
    matrices: int  # stacked along the rows: 3 for queries, keys and values
    start: int
    length: int
    offset: int
    split: bool


def matrices_in(name: str, shape: Sequence[int]) -> int:
    """How many matrices a parameter of the MM-DiT stacks that Muon steps along: 0 is for Adam (embeddings, modulation, output)."""
    inside_block = name.startswith("joint_blocks.") and (".attn." in name or ".mlp." in name)
    if len(shape) != 2 or not inside_block:
        return 0
    return 3 if name.endswith("qkv.weight") else 1


class Muon(Optimizer):
    """State as Adam's ("step", "exp_avg", "exp_avg_sq"), so checkpoints have one form. `place` says where the matrices lie."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._pieces: dict[int, list[MatrixPiece]] = {}

    def place(self, flat: Tensor, pieces: list[MatrixPiece]) -> None:
        """pieces: what this rank holds of whole matrices, and all split ones, in the same order on every rank."""
        self._pieces[id(flat)] = pieces

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None and "exp_avg" in self.state[flat]:
                    self._step(flat, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})

    def _step(self, flat: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        state, grad = self.state[flat], flat.grad
        state["step"] += 1
        average, square = state["exp_avg"].lerp_(grad, 1 - betas[0]), state["exp_avg_sq"]
        square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        unbiased = [1 - beta ** float(state["step"]) for beta in betas]
        update = average / unbiased[0] / ((square / unbiased[1]).sqrt_() + eps)
        pieces = self._pieces.get(id(flat), [])
        if pieces:
            nesterov = grad.lerp(average, betas[0]).view(-1)
            for piece in pieces:
                here = slice(piece.offset, piece.offset + piece.length)
                update.view(-1)[here] = self._direction(nesterov[here], piece)
        flat.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)

    def _direction(self, own: Tensor, piece: MatrixPiece) -> Tensor:
        """This rank's part of the matrix's orthogonal step, flattened."""
        whole, mine = own, slice(None)
        if piece.split:
            mine = slice(piece.start, piece.start + piece.length)
            whole = own.new_zeros(piece.shape[0] * piece.shape[1])
            whole[mine] = own
            dist.all_reduce(whole)
        parts = whole.view(piece.shape).chunk(piece.matrices)
        scale = STEP_RMS * max(parts[0].shape) ** 0.5
        return torch.cat([orthogonalise(part) * scale for part in parts]).view(-1)[mine]
