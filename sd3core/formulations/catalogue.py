"""The 61 formulations of the paper's section 5.1.1, by the names its tables print.

What the paper leaves open, and what is taken here:
- LDM-linear: LDM's betas and 1000 steps (`trajectories.Linear` has DDPM's as well).
- "edm/rf" and "edm/cos", EDM with the log-SNR weighting of rf and of v/cos: read as the distribution of the log-SNR, so
  sigma = t / (1 - t) and tan(pi t / 2) for t uniform. Read as the weight w(lambda), density and loss together ~
  e^(-lambda/2), both would be one formulation, sigma = tan(pi t / 2) / 2, but the paper ranks them apart. It is here as
  "edm/rf-weight".
- Where sampling begins (`trajectories`), and its steps (`Formulation`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sd3core.errors import UserError
from sd3core.formulation_names import EDM as EDM_PARAMETERS
from sd3core.formulation_names import EDM_RF_WEIGHT, LOGNORM, MODE, unknown_formulation
from sd3core.formulations.formulation import Formulation
from sd3core.formulations.predictions import SIGMA_DATA, F, Noise, V, Velocity
from sd3core.formulations.trajectories import EDM, Cosine, Linear, Rectified
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, Steps, TimestepDensity, Uniform

EPS_COSINE_START = 0.9565  # log-SNR -5.36, LDM's last: x0's error is 15 times the noise's; at t = 1 it is infinite


def _paper_formulations() -> dict[str, Formulation]:
    timesteps: dict[str, TimestepDensity] = {"rf": Uniform(), "rf/cosmap": CosMap()}
    timesteps |= {name: LogitNormal(mean, std) for name, (mean, std) in LOGNORM.items()}
    timesteps |= {name: Mode(scale) for name, scale in MODE.items()}
    levels: dict[str, TimestepDensity] = {name: LogitNormal(mean, std) for name, (mean, std) in EDM_PARAMETERS.items()}
    levels |= {"edm/rf": Uniform(), "edm/cos": CosMap()}  # sigma = t / (1 - t), tan(pi t / 2)

    linear = Linear()
    members = [Formulation(name, Rectified(), Velocity(), density) for name, density in timesteps.items()]
    members += [
        Formulation("eps/linear", linear, Noise(), Steps(linear.steps)),
        Formulation("v/linear", linear, V(), Steps(linear.steps)),
        Formulation("eps/cos", Cosine(start=EPS_COSINE_START), Noise()),
        Formulation("v/cos", Cosine(), V()),
    ]
    members += [Formulation(name, EDM(density), F()) for name, density in levels.items()]
    return {member.name: member for member in members}


FORMULATIONS: Mapping[str, Formulation] = MappingProxyType(_paper_formulations())
_ALL = FORMULATIONS | {EDM_RF_WEIGHT: Formulation(EDM_RF_WEIGHT, EDM(CosMap(), shift=SIGMA_DATA), F())}


def find_formulation(name: str) -> Formulation:
    """FORMULATIONS[name], or "edm/rf-weight". Raises UserError that names the nearest for a name that is not there."""
    problem = unknown_formulation(name)
    if problem is not None:
        raise UserError(problem)
    return _ALL[name]
