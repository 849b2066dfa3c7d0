"""The names of the paper's formulations, apart from what they do: a recipe is checked without torch."""

from __future__ import annotations

import difflib
import re

LOGNORM = {  # name -> mean and standard deviation of logit t
    f"rf/lognorm({mean:.2f},{std:.2f})": (mean, std)
    for mean in (-1.0, -0.5, 0.0, 0.5, 1.0)
    for std in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2)
}
MODE = {  # name -> scale: seven even steps over [-1, 1.75], and 1; scale 0 is plain rf
    f"rf/mode({scale:.2f})": scale for scale in (*(-1 + 2.75 * i / 6 for i in range(7)), 1.0)
}
EDM = {  # name -> mean and standard deviation of ln sigma
    f"edm({mean:.2f},{std:.2f})": (mean, std) for mean in (-1.2, -0.6, 0.0, 0.6, 1.2) for std in (0.6, 1.2, 1.8)
}
SCHEDULES = ("eps/linear", "v/linear", "eps/cos", "v/cos")
NAMES = ("rf", "rf/cosmap", *LOGNORM, *MODE, *SCHEDULES, *EDM, "edm/rf", "edm/cos")  # the paper's 61
EDM_RF_WEIGHT = "edm/rf-weight"  # the other reading of edm/rf, see sd3core.formulations.catalogue
FIXED_LEVELS = ("eps/linear", "v/linear")  # a table of noise levels, which a resolution shift would leave


def unknown_formulation(name: str) -> str | None:
    """What is wrong with a name, with the nearest that is known; None for a known one."""
    if name in (*NAMES, EDM_RF_WEIGHT):
        return None
    as_printed = re.sub(r"-?\d+\.?\d*", lambda number: f"{float(number.group()):.2f}", name.replace(" ", ""))
    close = difflib.get_close_matches(as_printed, NAMES, n=1, cutoff=0.0)[0]
    return f"formulation {name!r} is not one of the {len(NAMES)} known; did you mean {close!r}?"


def family(name: str) -> str:
    """Formulations of one family ask the same of a network: its weights can go on from one to the other.

    "rf" (velocity), "edm" (F behind EDM's scaling); eps/linear, v/linear, eps/cos and v/cos are each their own.
    """
    return re.match(r"rf\b|edm\b|.*", name).group()


def export_problem(name: str) -> str | None:
    """Why diffusers' SD3 pipeline cannot sample a model of this formulation; None where it can.

    It hands the network z_t and 1000 t, and takes the output for the velocity noise - x0.
    """
    if family(name) == "rf":
        return None
    return f"diffusers' SD3 pipeline samples rectified flow only, not {name}; sd3 sample draws from the checkpoint"


def shift_problem(name: str, shift: float) -> str | None:
    """What is wrong with a resolution shift for this formulation; None where it has a meaning."""
    if shift == 1 or name not in FIXED_LEVELS:
        return None
    return f"{name} has a fixed table of noise levels, which shift {shift:g} would leave; take shift 1"
