"""Densities from which training draws t in [0, 1], t = 1 being noise. Paper section 3.1.

Each has cdf(t); quantile(u), its inverse, so that quantile of a uniform u is a draw; density(t); and sample(n). All
work elementwise in the dtype of their input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3core.errors import UserError
from sd3core.rectified_flow import resolution_shift

MODE_SCALE_LIMIT = 2 / (math.pi - 2)  # beyond it the map of Mode is no longer monotonic


class TimestepDensity(ABC):
    """A density on [0, 1], given by its quantile function."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """u in [0, 1] -> t with P(T <= t) = u."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t): the inverse of quantile."""

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """pi(t), which integrates to 1 over [0, 1]."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, (n,) float32."""
        device = generator.device if generator is not None else None
        u = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
        return self.quantile(u).float()


@dataclass(frozen=True)
class Uniform(TimestepDensity):
    """pi(t) = 1."""

    def quantile(self, u: Tensor) -> Tensor:
        return u.clone()

    def cdf(self, t: Tensor) -> Tensor:
        return t.clone()

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal(TimestepDensity):
    """logit t ~ N(mean, std^2). mean < 0 leans to the data, mean > 0 to the noise; 0 at both ends. Paper 3.1."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise UserError(f"LogitNormal: std must be positive, not {self.std}")

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def cdf(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        return torch.erfc(-z / math.sqrt(2)) / 2  # torch's ndtr loses the lower tail

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.mean) / self.std
        pi = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2 * math.pi) * t * (1 - t))
        return torch.where((t > 0) & (t < 1), pi, torch.zeros_like(t))


@dataclass(frozen=True)
class Mode(TimestepDensity):
    """t = f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u), u uniform: heavy tails, s > 0 leans to the middle. Paper 3.1."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= MODE_SCALE_LIMIT:
            raise UserError(f"Mode: scale must lie in [-1, {MODE_SCALE_LIMIT:.4f}], not {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        return self._f(1 - u).clamp(0, 1)  # f decreases; rounding may leave the interval by one digit

    def cdf(self, t: Tensor) -> Tensor:
        return (1 - self._u(t)).to(t.dtype)

    def density(self, t: Tensor) -> Tensor:
        """1 / |f'(u)| at f(u) = t."""
        slope = 1 + self.scale - self.scale * math.pi / 2 * torch.sin(math.pi * self._u(t))
        return (1 / slope.abs()).to(t.dtype)

    def _f(self, u: Tensor) -> Tensor:
        return 1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)

    def _u(self, t: Tensor) -> Tensor:
        """u with f(u) = t, float64, by bisection: f has no inverse in closed form."""
        target = t.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            too_high = self._f(middle) < target
            low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap(TimestepDensity):
    """t = 1 - 1 / (tan(pi u / 2) + 1): the log-SNR density of the cosine schedule. Paper 3.1."""

    def quantile(self, u: Tensor) -> Tensor:
        sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return sine / (sine + cosine)  # the same as above, without the tangent's overflow at u = 1

    def cdf(self, t: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(t, 1 - t)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t.square())


@dataclass(frozen=True)
class Steps(TimestepDensity):
    """t = 1/count, 2/count, ..., 1, equally often: the steps of a discrete schedule. `density` is their mean one, 1."""

    count: int = 1000

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(f"Steps: count must be at least 1, not {self.count}")

    def quantile(self, u: Tensor) -> Tensor:
        return ((u * self.count).floor().clamp(max=self.count - 1) + 1) / self.count

    def cdf(self, t: Tensor) -> Tensor:
        return (t * self.count + 1e-3).floor() / self.count  # a float32 step may lie a little below itself

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Shifted(TimestepDensity):
    """The density of t' = alpha t / (1 + (alpha - 1) t), t drawn from `base`: the resolution shift. Paper 5.3.2.

    logit t' = logit t + ln(alpha), so LogitNormal(mean, std) becomes LogitNormal(mean + ln(alpha), std).
    """

    base: TimestepDensity
    alpha: float

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"Shifted: alpha must be positive, not {self.alpha}")

    def shift_t(self, t: Tensor) -> Tensor:
        """t'."""
        return resolution_shift(t, self.alpha)

    def quantile(self, u: Tensor) -> Tensor:
        return self.shift_t(self.base.quantile(u))

    def cdf(self, t: Tensor) -> Tensor:
        return self.base.cdf(self._unshift_t(t))

    def density(self, t: Tensor) -> Tensor:
        """pi(t) of the base at the unshifted t, times |dt / dt'|."""
        slope = self.alpha / (self.alpha + (1 - self.alpha) * t).square()
        return self.base.density(self._unshift_t(t)) * slope

    def _unshift_t(self, t: Tensor) -> Tensor:
        return resolution_shift(t, 1 / self.alpha).clamp(0, 1)  # rounding may leave the interval by one digit
