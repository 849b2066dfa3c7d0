"""Muon on sharded weights: orthogonal steps for the blocks' matrices.

All else takes Adam.

Jordan et al. 2024, with the scale of Liu et al. 2025 (arXiv:2502.16982): a matrix's step has the root mean square 0.2 that Adam's
steps typically have, so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from sd3core.optim import orthogonalise

STEP_RMS = 0.2
MATRIX_MODULES = {"attn", "attn2", "cross", "mlp"}
STACKED = {"qkv": 3, "kv": 2}  # matrices in one parameter


@dataclass(frozen=True)
class MatrixPiece:
    """Elements [start, start + length) of a matrix, at [offset, offset + length) of a flat partition of this rank.

    `split`: no rank holds the whole matrix. All ranks then put it together, also one that holds nothing of it (length 0).
    """

    shape: tuple[int, int]
    matrices: int  # stacked along the rows: 3 for queries, keys and values together
    start: int
    length: int
    offset: int
    split: bool


def matrices_in(name: str, shape: Sequence[int]) -> int:
    """How many matrices a parameter of a backbone stacks that Muon steps along: 0 is for Adam.

    Muon's are the matrices of attention and MLP in the transformer's blocks; Adam's embeddings, modulation, convolutions, output.
    """
    blocks, _, part = name.partition(".")
    if len(shape) != 2 or blocks not in ("joint_blocks", "blocks") or not MATRIX_MODULES & set(part.split(".")):
        return 0
    return STACKED.get(part.split(".")[-2], 1)


class Muon(Optimizer):
    """State as Adam's ("step", "exp_avg", "exp_avg_sq"; the squares of matrices stay 0), so checkpoints have one form.

    `matrix_rate`: the matrices' learning rate as a multiple of `lr`. `dtype`: in which steps are made orthogonal. `place` says where the
    matrices lie.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        matrix_rate: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.matrix_rate, self.dtype = matrix_rate, dtype
        self._pieces: dict[int, list[MatrixPiece]] = {}
        self._others: dict[int, list[slice]] = {}  # what lies between the matrices

    def place(self, flat: Tensor, pieces: list[MatrixPiece]) -> None:
        """pieces: what this rank holds of whole matrices, and all split ones, in the same order on every rank.

        The split ones are stepped along first, so that no rank waits for another's whole ones.
        """
        self._pieces[id(flat)] = sorted(pieces, key=attrgetter("split"), reverse=True)  # stable
        held = sorted((piece for piece in pieces if piece.length), key=attrgetter("offset"))
        edges = [0, *(edge for piece in held for edge in (piece.offset, piece.offset + piece.length))]
        bounds = zip(edges[::2], [*edges[1::2], flat.numel()], strict=True)
        self._others[id(flat)] = [slice(begin, end) for begin, end in bounds if begin < end]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None and "exp_avg" in self.state[flat]:
                    self._step(flat, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")})

    def _step(self, flat: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        state = self.state[flat]
        state["step"] += 1
        average = state["exp_avg"].lerp_(flat.grad, 1 - betas[0]).view(-1)
        weights, grad, square = flat.view(-1), flat.grad.view(-1), state["exp_avg_sq"].view(-1)
        flat.mul_(1 - lr * weight_decay)
        bias, square_bias = (1 - beta ** float(state["step"]) for beta in betas)
        for part in self._others.get(id(flat), [slice(None)]):
            square[part].mul_(betas[1]).addcmul_(grad[part], grad[part], value=1 - betas[1])
            spread = square[part].div(square_bias).sqrt_().add_(eps)
            weights[part].addcdiv_(average[part], spread, value=-lr / bias)
        for piece in self._pieces.get(id(flat), []):
            part = slice(piece.offset, piece.offset + piece.length)
            nesterov = grad[part].lerp(average[part], betas[0])
            weights[part].sub_(self._direction(nesterov, piece), alpha=lr * self.matrix_rate)

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
        return torch.cat([orthogonalise(part.to(self.dtype)) * scale for part in parts]).view(-1)[mine]
