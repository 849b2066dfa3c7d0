"""A small MM-DiT learns by every kind of formulation."""

import numpy as np
import pytest
import torch

from sd3core.formulations import find_formulation
from sd3core.metrics.validation_loss import level_losses, validation_loss
from sd3core.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig.from_depth(1, context_dim=8, pooled_dim=8, position_base=2, position_side=2, position_max=4)
PATTERN = torch.linspace(-1.7, 1.7, 4).expand(16, 4, 4)  # columns, mean 0, standard deviation 1.27
CONDITION = torch.zeros(32, 2, 8), torch.zeros(32, 8)


def latents(generator):
    """The pattern, stronger or weaker. (32, 16, 4, 4)."""
    return (1 + 0.2 * torch.randn(32, 1, 1, 1, generator=generator)) * PATTERN


@pytest.mark.parametrize("name", ["rf/lognorm(0.00,1.00)", "eps/linear", "v/cos", "edm(-0.60,1.20)"])
def test_it_learns(name):
    """The velocity error at equal log-SNRs falls by more than half."""
    torch.manual_seed(0)
    model, formulation, generator = MMDiT(CONFIG), find_formulation(name), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    held_out = latents(torch.Generator().manual_seed(2))

    def predict(z, t):
        return model(z, t, *CONDITION)

    velocity = formulation.as_rectified_flow(predict)

    @torch.no_grad()
    def measured():
        return validation_loss(level_losses(velocity, held_out, np.arange(32), seed=0)).value

    fresh = measured()
    for _ in range(80):
        x0 = latents(generator)
        noise = torch.randn(x0.shape, generator=generator)
        loss = formulation.loss(predict, x0, noise, formulation.sample_t(32, generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measured() < fresh / 2
