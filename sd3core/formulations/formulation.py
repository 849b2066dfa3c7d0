"""A formulation: its path, what the network predicts, and how training draws t. Paper sections 2 and 3."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sd3core.errors import UserError
from sd3core.formulations.predictions import Prediction, Velocity
from sd3core.formulations.trajectories import Level, Rectified, Trajectory
from sd3core.rectified_flow import per_sample
from sd3core.sample_settings import Convention
from sd3core.sampling import sigma_schedule
from sd3core.timestep_sampling import Shifted, TimestepDensity, Uniform

Network = Callable[[Tensor, Tensor], Tensor]  # the bare network: (z_in (B, ...), t_in (B,)) -> output (B, ...)


@dataclass(frozen=True)
class Formulation:
    """z_t = a_t x0 + b_t noise, t in [0, 1], 1 = noise. The network is shown z_t and t, or c_in z_t and c_noise with
    EDM.

    Sampling: `as_rectified_flow` makes a rectified-flow model of the network, so that every solver, guidance and
    measure of velocities serves all formulations:

        sample_euler(formulation.as_rectified_flow(predict), formulation.start(noise), formulation.sigmas(num_steps))

    z_t / (a + b) at the time b / (a + b) is the formulation's ODE in other coordinates; path, grid and prior stay its
    own. An Euler step there goes from z_t to a_s x0 + b_s noise with the x0 and noise predicted at t: this is Euler in
    sigma for EDM and DDIM's step for cosine and linear. Euler on dz/dt would fail for EDM and linear, where db/dt is
    infinite at the ends; `velocity` gives dz/dt to other solvers.
    """

    name: str
    trajectory: Trajectory
    prediction: Prediction
    timestep_density: TimestepDensity = Uniform()
    shift: float = 1.0  # alpha of the resolution shift that is in it

    @property
    def is_rectified_flow(self) -> bool:
        return isinstance(self.trajectory, Rectified) and isinstance(self.prediction, Velocity)

    def a_b(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, b_t), in t's shape and dtype."""
        a, b, _ = self.trajectory.level(t)
        return a.to(t.dtype), b.to(t.dtype)

    def log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = ln(a^2 / b^2)."""
        a, b, _ = self.trajectory.level(t)
        return (2 * (a.log() - b.log())).to(t.dtype)

    def rf_time(self, t: Tensor) -> Tensor:
        """The t at which rectified flow has the same log-SNR: b / (a + b)."""
        if isinstance(self.trajectory, Rectified):
            return t
        a, b, _ = self.trajectory.level(t)
        return (b / (a + b)).to(t.dtype)

    def weight(self, t: Tensor) -> Tensor:
        """w_t for 0 < t < 1: with t uniform, the loss is -1/2 w_t lambda'_t ||error of the noise||^2 (paper section 2).

        The density that t is drawn from is not in it. The paper prints weights up to a factor: eps/cos has 1 / pi,
        v/cos 2 / pi and EDM 8 times what stands there.
        """
        (a, b, _), (da, db) = self.trajectory.level(t), self.trajectory.slopes(t)
        return (self.prediction.error_scale(a, b) / (db / b - da / a)).to(t.dtype)  # lambda' = 2 (a'/a - b'/b)

    def quantile(self, u: Tensor) -> Tensor:
        """u uniform in [0, 1] -> t."""
        return self.timestep_density.quantile(u)

    def sample_t(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of t, (n,) float32."""
        return self.timestep_density.sample(n, generator)

    def shifted(self, alpha: float) -> Formulation:
        """This formulation at a log-SNR lower by 2 ln(alpha) in every draw and sampling step: the shift of 5.3.2.

        The network is told a noise level as before; only how often it is met changes. For rectified flow t is the
        level, so the density of t moves, by the paper's formula; for cosine and EDM the level at each t does: edm(m, s)
        becomes edm(m + ln alpha, s). Raises UserError for linear, whose levels are a table.
        """
        if not alpha > 0:
            raise UserError(f"shift must be positive, not {alpha}")
        if alpha == 1:
            return self
        density = Shifted(self.timestep_density, alpha) if self.is_rectified_flow else self.timestep_density
        return replace(
            self, trajectory=self.trajectory.shifted(alpha), timestep_density=density, shift=alpha * self.shift
        )

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = a_t x0 + b_t noise. x0, noise (B, ...); t (B,) -> (B, ...)."""
        a, b = _coefficients(self.trajectory.level(t), x0)
        return a * x0 + b * noise

    def network_inputs(self, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(z_in, t_in): what the bare network is given for z_t."""
        return self._inputs(z_t, self.trajectory.level(t))

    def loss(self, predict: Network, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """||output - target||^2, the mean over all but the batch. -> (B,) float32."""
        level = self.trajectory.level(t)
        a, b = _coefficients(level, x0)
        output = predict(*self._inputs(a * x0 + b * noise, level))
        error = output.float() - self.prediction.target(x0, noise, a, b).float()
        return error.square().flatten(1).mean(1)

    def velocity(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """dz_t/dt = a' x0 + b' noise of the sampling path, in the formulation's own t."""
        if self.is_rectified_flow:
            return output
        x0, noise = self._x0_and_noise(output, z_t, self.trajectory.level(t))
        da, db = (per_sample(slope, z_t).to(z_t.dtype) for slope in self.trajectory.slopes(t))
        return da * x0 + db * noise

    def x0(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The data that the output speaks of."""
        return self._x0_and_noise(output, z_t, self.trajectory.level(t))[0]

    def sampling_grid(self, num_steps: int) -> Tensor:
        """The formulation's times to integrate over, descending to 0. (num_steps + 1,) float64.

        Even in t, but Karras' grid for EDM (the paper names none). Where each begins stands in `trajectories`.
        """
        if num_steps < 1:
            raise UserError(f"sampling_grid: num_steps must be at least 1, not {num_steps}")
        grid = self.trajectory.grid(num_steps)
        return self.timestep_density.shift_t(grid) if isinstance(self.timestep_density, Shifted) else grid

    @property
    def prior_scale(self) -> float:
        """Sampling starts at prior_scale * noise: sqrt(a^2 + b^2), the standard deviation of z there if the data's is
        1.
        """
        a, b, _ = self.trajectory.level(self.sampling_grid(1)[0])
        return float((a**2 + b**2).sqrt())

    def as_rectified_flow(self, predict: Network) -> Network:
        """The network as a rectified-flow model: (z, t) of the straight path -> velocity noise - x0.

        The straight path's z is z_t / (a + b) at the same log-SNR. A level noisier than the noisiest that sampling may
        begin with (sigma = 80 for EDM) is shown as that one.
        """
        if self.is_rectified_flow:
            return predict

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            level = self.trajectory.level_at(t)
            a, b = _coefficients(level, z)
            z_own = (a + b) * z
            x0, noise = self._x0_and_noise(predict(*self._inputs(z_own, level)), z_own, level)
            return noise - x0

        return velocity

    def sigmas(self, num_steps: int, convention: Convention = "reference") -> Tensor:
        """The sampling grid as rf times, for `as_rectified_flow`. (num_steps + 1,) float32, descending to 0.

        convention: of rectified flow's schedule, see `sampling.sigma_schedule`; others have one grid.
        """
        if self.is_rectified_flow:
            return sigma_schedule(num_steps, shift=self.shift, convention=convention)
        return self.rf_time(self.sampling_grid(num_steps)).float()

    def start(self, noise: Tensor) -> Tensor:
        """The prior as the straight path has it at sigmas(n)[0]: prior_scale * noise / (a + b)."""
        a, b, _ = self.trajectory.level(self.sampling_grid(1)[0])
        return noise * (self.prior_scale / float(a + b))

    def _inputs(self, z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        if self.is_rectified_flow:
            return z, level.time
        time = level.time.to(torch.promote_types(z.dtype, torch.float32))
        return self.prediction.input_scale(*_coefficients(level, z)) * z, time

    def _x0_and_noise(self, output: Tensor, z: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return self.prediction.x0_and_noise(output, z, *_coefficients(level, z))


def _coefficients(level: Level, like: Tensor) -> tuple[Tensor, Tensor]:
    """a and b as (B, 1, ..., 1), to be multiplied with `like` (B, ...)."""
    return tuple(per_sample(x, like).to(like.dtype) for x in (level.a, level.b))
