"""Paths from data to noise: a_t and b_t of z_t = a_t x0 + b_t noise.

t = 0 is the data, t = 1 noise. Paper section 3.

A level of noise is the ratio b / a, whatever the path; the log-SNR is lambda = -2 ln(b / a). Levels are compared by "rf
time", the time at which rectified flow has them: b / (a + b), from 0 (data) to 1 (noise).

| path      | a_t, b_t                              | where sampling begins                                            |
|-----------|---------------------------------------|------------------------------------------------------------------|
| Rectified | 1 - t, t                              | t = 1                                                            |
| Cosine    | cos(pi t / 2), sin(pi t / 2)          | t = 1; to predict the noise before it: at a = 0 it says nothing  |
|           |                                       | of x0                                                            |
| Linear    | sqrt(prod(1 - beta_s)), sqrt(1 - a^2) | the last step; its signal, a = 0.068, is ignored as LDM does     |
| EDM       | 1, sigma(t)                           | sigma = 80, or sigma(1 - 1e-5) where that is less: sigma(1) is   |
|           |                                       | infinite                                                         |
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sd3core.errors import UserError
from sd3core.timestep_sampling import TimestepDensity

LARGEST_T = 1 - 2**-24  # the largest float32 below 1: EDM's t = 1 is taken for it, so that no draw is infinite


class Level(NamedTuple):
    """One noise level per sample, each (B,): z = a x0 + b noise, and the time that the network is told."""

    a: Tensor
    b: Tensor
    time: Tensor


class Trajectory(ABC):
    """A path, in its own time t in [0, 1] and by rf time. All but Rectified compute in float64."""

    @abstractmethod
    def level(self, t: Tensor) -> Level:
        """The level at the path's own time t."""

    @abstractmethod
    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(da/dt, db/dt)."""

    @abstractmethod
    def level_at(self, rf_time: Tensor) -> Level:
        """The level b / (a + b) = rf_time; a noisier one than sampling begins with is taken for that."""

    @abstractmethod
    def grid(self, num_steps: int) -> Tensor:
        """Times from where sampling begins to 0, (num_steps + 1,) float64."""

    @abstractmethod
    def shifted(self, alpha: float) -> Trajectory:
        """The path whose b / a is alpha times as large: the log-SNR at every t is lower by 2 ln(alpha)."""


@dataclass(frozen=True)
class Rectified(Trajectory):
    """a = 1 - t, b = t. The network is told t."""

    def level(self, t: Tensor) -> Level:
        return Level(1 - t, t, t)

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def level_at(self, rf_time: Tensor) -> Level:
        return self.level(rf_time)

    def grid(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def shifted(self, alpha: float) -> Rectified:
        """Itself: its t is the level, so it is the density of t that moves (Formulation.shifted)."""
        return self


@dataclass(frozen=True)
class Cosine(Trajectory):
    """a = cos(pi t / 2), b = sin(pi t / 2) (Nichol and Dhariwal 2021). The network is told t; of a level at shift 1."""

    start: float = 1.0  # sampling begins at this t
    shift: float = 1.0

    def level(self, t: Tensor) -> Level:
        angle = math.pi / 2 * t.double()
        return self._at_ratio(self.shift * torch.sin(angle), torch.cos(angle))

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, b, _ = self.level(t)
        angle = math.pi / 2 * t.double()
        turning = math.pi / 2 * self.shift / (torch.cos(angle) ** 2 + (self.shift * torch.sin(angle)) ** 2)  # of (a, b)
        return -b * turning, a * turning

    def level_at(self, rf_time: Tensor) -> Level:
        a, b, _ = self.level(torch.tensor(self.start))
        s = rf_time.double().clamp(max=float(b / (a + b)))
        return self._at_ratio(s, 1 - s)

    def grid(self, num_steps: int) -> Tensor:
        return torch.linspace(self.start, 0, num_steps + 1, dtype=torch.float64)

    def shifted(self, alpha: float) -> Cosine:
        return replace(self, shift=alpha * self.shift)

    def _at_ratio(self, b: Tensor, a: Tensor) -> Level:
        angle = torch.atan2(b, a)
        return Level(torch.cos(angle), torch.sin(angle), angle * (2 / math.pi))


@dataclass(frozen=True)
class Linear(Trajectory):
    """a^2 = prod_{s <= k} (1 - beta_s) at t = k / steps, b^2 = 1 - a^2, beta from first_beta to last_beta (Ho et al.
    2020).

    even_in "sqrt": sqrt(beta) rises evenly, as in LDM, whose numbers are the defaults (the paper gives none); "beta":
    beta does, as in DDPM. Between two steps ln a^2 is interpolated; training and sampling stay on the steps. The
    network is told t.
    """

    first_beta: float = 0.00085
    last_beta: float = 0.012
    steps: int = 1000
    even_in: Literal["sqrt", "beta"] = "sqrt"

    def __post_init__(self) -> None:
        if not (0 < self.first_beta <= self.last_beta < 1 and self.steps >= 1):
            raise UserError(
                f"Linear: betas must rise inside (0, 1) over at least one step, not from {self.first_beta} to"
                f" {self.last_beta} over {self.steps}"
            )

    @cached_property
    def log_signal(self) -> Tensor:
        """ln a^2 at t = 0, 1 / steps, ..., 1. (steps + 1,) float64."""
        power = 0.5 if self.even_in == "sqrt" else 1.0
        ends = (self.first_beta**power, self.last_beta**power)
        betas = torch.linspace(*ends, self.steps, dtype=torch.float64) ** (1 / power)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])

    def level(self, t: Tensor) -> Level:
        step, slope = self._before(t)
        log_signal = self.log_signal.to(t.device)[step] + slope * (t.double() - step / self.steps)
        return self._of(log_signal, t.double())

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes towards the data, where two steps meet."""
        a, b, _ = self.level(t)
        _, slope = self._before(t)
        return a * slope / 2, -(a**2) * slope / (2 * b)

    def level_at(self, rf_time: Tensor) -> Level:
        table = self.log_signal.to(rf_time.device)
        s = rf_time.double()
        log_signal = (-torch.log1p((s / (1 - s)) ** 2)).clamp(min=float(table[-1]))  # a^2 = 1 / (1 + (b / a)^2)
        step = (torch.searchsorted(-table, -log_signal) - 1).clamp(0, self.steps - 1)
        t = (step + (log_signal - table[step]) / (table[step + 1] - table[step])) / self.steps
        return self._of(log_signal, t)

    def grid(self, num_steps: int) -> Tensor:
        """Levels as even as the steps allow, both ends included; of more intervals than steps, between them."""
        t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        return (t * self.steps).round() / self.steps if num_steps <= self.steps else t

    def shifted(self, alpha: float) -> Linear:
        raise UserError(f"a schedule with a table of noise levels has no shift; take shift 1, not {alpha:g}")

    def _before(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(k, d ln a^2 / dt) of the interval (k / steps, (k + 1) / steps] that t is in."""
        table = self.log_signal.to(t.device)
        position = t.double() * self.steps - 1e-3  # a float32 k / steps may lie a little above
        step = (position.ceil().long() - 1).clamp(0, self.steps - 1)
        return step, (table[step + 1] - table[step]) * self.steps

    def _of(self, log_signal: Tensor, t: Tensor) -> Level:
        return Level(torch.exp(log_signal / 2), torch.sqrt(-torch.expm1(log_signal)), t)


@dataclass(frozen=True)
class EDM(Trajectory):
    """a = 1, b = sigma(t) = shift * s / (1 - s), s the t-quantile of `levels`, a density of rf time (Karras et al.
    2022).

    So the log-SNR is distributed as in rectified flow whose t is drawn from `levels`; LogitNormal(P_m, P_s) gives EDM's
    own, ln sigma ~ N(P_m, P_s^2). The network is told c_noise = ln(sigma) / 4, of which the MM-DiT embeds 1000 times.
    """

    levels: TimestepDensity
    shift: float = 1.0

    SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # of the sampling grid, Karras et al. table 1

    def level(self, t: Tensor) -> Level:
        s = self._rf_time(t)
        return self._of(self.shift * s / (1 - s))

    def slopes(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self._rf_time(t)
        slope = self.shift / (1 - s) ** 2 / self.levels.density(s)
        return torch.zeros_like(slope), slope

    def level_at(self, rf_time: Tensor) -> Level:
        top = self.shift * self.SIGMA_MAX
        s = rf_time.double().clamp(max=top / (1 + top))
        return self._of(s / (1 - s))

    def grid(self, num_steps: int) -> Tensor:
        """Karras' sigmas, even in sigma^(1/7), from the first to 0.002 in num_steps - 1 steps, then 0; all times shift."""
        top = self.levels.quantile(torch.tensor(1 - 1e-5, dtype=torch.float64))
        first = min(self.SIGMA_MAX, float(top / (1 - top)))
        ends = first ** (1 / self.RHO), self.SIGMA_MIN ** (1 / self.RHO)
        sigmas = torch.linspace(*ends, num_steps, dtype=torch.float64) ** self.RHO
        return torch.cat([self.levels.cdf(sigmas / (1 + sigmas)), torch.zeros(1, dtype=torch.float64)])

    def shifted(self, alpha: float) -> EDM:
        return replace(self, shift=alpha * self.shift)

    def _rf_time(self, t: Tensor) -> Tensor:
        return self.levels.quantile(t.double().clamp(max=LARGEST_T))

    def _of(self, sigma: Tensor) -> Level:
        return Level(torch.ones_like(sigma), sigma, sigma.clamp(1e-6, 1e6).log() / 4)
