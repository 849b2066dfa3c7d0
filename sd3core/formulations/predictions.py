"""What a network predicts, and how x0 and the noise are found from it. x0, noise, z (B, ...) and a, b (B, 1, ..., 1).

| prediction | target                  | ||error||^2 / ||error of the noise||^2 | on paths with    |
|------------|-------------------------|----------------------------------------|------------------|
| Velocity   | noise - x0              | 1 / a^2                                | a + b = 1        |
| Noise      | noise                   | 1                                      | any              |
| V          | a noise - b x0          | 1 / a^2                                | a^2 + b^2 = 1    |
| F          | (x0 - c_skip z) / c_out | (sigma^2 + sigma_d^2) / sigma_d^2      | a = 1, b = sigma |
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # sigma_d of EDM's scaling (Karras et al. 2022), whose square is in the paper's weight


class Prediction(ABC):
    """One kind of network output."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """What the network should give for z = a x0 + b noise."""

    @abstractmethod
    def x0_and_noise(self, output: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The (x0, noise) with z = a x0 + b noise whose target is `output`."""

    @abstractmethod
    def error_scale(self, a: Tensor, b: Tensor) -> Tensor:
        """||error of the output||^2 / ||error of the noise||^2."""

    def input_scale(self, a: Tensor, b: Tensor) -> Tensor:
        """The network is shown input_scale * z."""
        return torch.ones_like(a)


class Velocity(Prediction):
    """The velocity of the straight path: dz/dt = noise - x0."""

    def target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return noise - x0

    def x0_and_noise(self, output: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return z - b * output, z + a * output

    def error_scale(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 / a**2


class Noise(Prediction):
    """The noise (Ho et al. 2020), "eps". Where a = 0 it says nothing of x0."""

    def target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return noise

    def x0_and_noise(self, output: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (z - b * output) / a, output

    def error_scale(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.ones_like(a)


class V(Prediction):
    """v = a noise - b x0 (Salimans and Ho 2022): (z, v) is (x0, noise) turned by an angle."""

    def target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return a * noise - b * x0

    def x0_and_noise(self, output: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a * z - b * output, b * z + a * output

    def error_scale(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 / a**2


class F(Prediction):
    """F = (x0 - c_skip z) / c_out of an input c_in z (Karras et al. 2022, table 1), with h^2 = sigma^2 + sigma_d^2:

    c_skip = sigma_d^2 / h^2, c_out = sigma sigma_d / h, c_in = 1 / h. The forms below are these, without a division by
    sigma.
    """

    def target(self, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (b * x0 - SIGMA_DATA**2 * noise) * self.input_scale(a, b) / SIGMA_DATA

    def x0_and_noise(self, output: Tensor, z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        c_in = self.input_scale(a, b)
        x0 = SIGMA_DATA * c_in * (SIGMA_DATA * c_in * z + b * output)
        noise = c_in * (b * c_in * z - SIGMA_DATA * output)
        return x0, noise

    def error_scale(self, a: Tensor, b: Tensor) -> Tensor:
        return (b**2 + SIGMA_DATA**2) / SIGMA_DATA**2

    def input_scale(self, a: Tensor, b: Tensor) -> Tensor:
        return (b**2 + SIGMA_DATA**2) ** -0.5
