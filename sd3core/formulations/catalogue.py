"""The formulations as objects, by the names that the paper's tables print.

These are the 61 of section 5.1.1, and any other that sd3core.formulation_names knows.

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
from functools import cache
from types import MappingProxyType

from sd3core.errors import UserError
from sd3core.formulation_names import FORMULATION_KINDS, PAPER, FormulationKind, read_name
from sd3core.formulations.formulation import Formulation
from sd3core.formulations.predictions import SIGMA_DATA, F, Noise, V, Velocity
from sd3core.formulations.trajectories import EDM, Cosine, Linear, Rectified
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode, Steps, Uniform

EPS_COSINE_START = 0.9565  # log-SNR -5.36, LDM's last: x0's error is 15 times the noise's; at t = 1 it is infinite

DENSITIES = {"uniform": Uniform, "steps": Steps, "cosmap": CosMap, "mode": Mode, "lognorm": LogitNormal}
PREDICTIONS = {"velocity": Velocity, "noise": Noise, "v": V, "f": F}
PATHS = {
    "rectified": Rectified(),
    "linear": Linear(),
    "cosine": Cosine(),
    "cosine-early": Cosine(start=EPS_COSINE_START),
}
EDM_SHIFTS = {"edm": 1.0, "edm-shifted": SIGMA_DATA}  # paths on which the density is that of sigma


def find_formulation(name: str) -> Formulation:
    """The formulation of a name, which need not be written in the canonical way. Raises UserError that says what is wrong."""
    try:
        canonical, numbers = read_name(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    return _make(canonical, FORMULATION_KINDS[canonical.partition("(")[0]], numbers)


@cache
def _make(name: str, kind: FormulationKind, numbers: tuple[float, ...]) -> Formulation:
    density, prediction = DENSITIES[kind.density](*numbers), PREDICTIONS[kind.predicts]()
    if kind.path in EDM_SHIFTS:
        return Formulation(name, EDM(density, EDM_SHIFTS[kind.path]), prediction)
    return Formulation(name, PATHS[kind.path], prediction, density)


FORMULATIONS: Mapping[str, Formulation] = MappingProxyType({name: find_formulation(name) for name in PAPER})
