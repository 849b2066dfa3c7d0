"""The paper's formulations in one form: path, prediction, timestep density.

A path is z_t = a_t x0 + b_t noise.
"""

from sd3core.formulations.catalogue import FORMULATIONS, find_formulation
from sd3core.formulations.formulation import Formulation

__all__ = ["FORMULATIONS", "Formulation", "find_formulation"]
