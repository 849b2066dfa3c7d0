"""The paper's formulations in one form: z_t = a_t x0 + b_t noise, a loss on what the network predicts, a density of t.

So far the rectified-flow family of section 5.1.1, named as the paper's tables print it: 40 of the 61.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sd3core import rectified_flow
from sd3core.errors import UserError
from sd3core.formulation_names import LOGNORM, MODE, unknown_formulation
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, TimestepDensity, Uniform

Predict = Callable[[Tensor, Tensor], Tensor]  # (z_in (B, ...), t_in (B,)) -> network output (B, ...)


@dataclass(frozen=True)
class Formulation:
    """Rectified flow, a_t = 1 - t and b_t = t; the network predicts the velocity. Members differ in how t is drawn."""

    name: str
    timestep_density: TimestepDensity
    prior_scale: float = 1.0  # sampling starts at prior_scale * noise

    def a_b(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(1 - t, t)."""
        return 1 - t, t

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = ln(a^2 / b^2)."""
        return rectified_flow.log_snr(t)

    def weight(self, t: Tensor) -> Tensor:
        """w_t = t / (1 - t) of the paper's L_w for t uniform; the density that t is drawn from is not in it."""
        return t / (1 - t)

    def quantile(self, u: Tensor) -> Tensor:
        """u uniform in [0, 1] -> t."""
        return self.timestep_density.quantile(u)

    def sample_t(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of t, (n,) float32."""
        return self.timestep_density.sample(n, generator)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = (1 - t) x0 + t noise."""
        return rectified_flow.interpolate(x0, noise, t)

    def loss(self, predict: Predict, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """||predict(z_t, t) - (noise - x0)||^2, the mean over all but the batch. -> (B,) float32."""
        output = predict(self.add_noise(x0, noise, t), t)
        error = output.float() - rectified_flow.velocity_target(x0, noise).float()
        return error.square().flatten(1).mean(1)

    def velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt of the sampling path: the output itself."""
        return output

    def x0(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The data that the output speaks of: z_t - t output."""
        return rectified_flow.x0_from_velocity(output, z_t, t)

    def sampling_grid(self, num_steps: int) -> Tensor:
        """Times to integrate over, from 1 to 0. (num_steps + 1,) float32."""
        return torch.linspace(1, 0, num_steps + 1)


def _rectified_flow_family() -> dict[str, Formulation]:
    densities: dict[str, TimestepDensity] = {"rf": Uniform(), "rf/cosmap": CosMap()}
    densities |= {name: LogitNormal(mean, std) for name, (mean, std) in LOGNORM.items()}
    densities |= {name: Mode(scale) for name, scale in MODE.items()}
    return {name: Formulation(name, density) for name, density in densities.items()}


FORMULATIONS: Mapping[str, Formulation] = MappingProxyType(_rectified_flow_family())


def find_formulation(name: str) -> Formulation:
    """FORMULATIONS[name]. Raises UserError that names the nearest for a name that is not there."""
    problem = unknown_formulation(name)
    if problem is not None:
        raise UserError(problem)
    return FORMULATIONS[name]
