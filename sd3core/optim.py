"""Makes a matrix orthogonal for Muon's steps: all singular values near one."""

from __future__ import annotations

import torch
from torch import Tensor

# (a, b, c) of x <- a x + b x^3 + c x^5: nearest to 1 on [SMALLEST, 1], then on the interval that the step before gives.
# Each interval goes 1 % further up than it must: beyond it these polynomials shoot up, and bf16 rounds.
QUINTICS = ((8.0172, -22.941, 16.6113), (3.6119, -2.6521, 0.5123), (2.661, -1.9451, 0.4357))
SMALLEST = 0.01  # singular value, as a part of the matrix's Frobenius norm, that still gets a whole step


def orthogonalise(matrix: Tensor) -> Tensor:
    """(m, n) -> nearly U V^T of its decomposition: singular values from 0.72 to 1.28, of those below SMALLEST less."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = ((matrix.T if tall else matrix) / (matrix.norm() + 1e-7)).contiguous()  # transposed bf16 multiplies slowly
    for a, b, c in QUINTICS:
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
