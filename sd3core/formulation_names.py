"""The formulations by name, in plain words: a recipe is checked without torch. sd3core.formulations.catalogue makes objects of them.

A new one is a line in FORMULATION_KINDS. Of the kinds with numbers any are taken inside their bounds: `rf/lognorm(0.3,0.8)`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Number:
    """A number in a name: what it is, and its bounds, which are allowed."""

    letter: str
    meaning: str
    low: float
    high: float


@dataclass(frozen=True)
class FormulationKind:
    """What a name stands for. `density`: of t, on EDM's path of sigma."""

    path: Literal["rectified", "cosine", "cosine-early", "linear", "edm", "edm-shifted"]
    predicts: Literal["velocity", "noise", "v", "f"]
    density: Literal["uniform", "steps", "cosmap", "mode", "lognorm"]
    numbers: tuple[Number, ...] = ()
    version: int = 1  # raise it when what is trained under the name changes: then it is trained again


LOGIT_T = (Number("m", "mean of logit t", -5.0, 5.0), Number("s", "standard deviation of logit t", 0.05, 5.0))
SCALE = (Number("s", "scale", -1.0, 1.75),)  # as the paper's; beyond 1.7519 t would not grow with u
LN_SIGMA = (Number("m", "mean of ln sigma", -3.0, 3.0), Number("s", "standard deviation of ln sigma", 0.3, 3.0))
EDM_RF_WEIGHT = "edm/rf-weight"  # the other reading of edm/rf, see sd3core.formulations.catalogue

FORMULATION_KINDS: dict[str, FormulationKind] = {
    "rf": FormulationKind("rectified", "velocity", "uniform"),
    "rf/cosmap": FormulationKind("rectified", "velocity", "cosmap"),
    "rf/lognorm": FormulationKind("rectified", "velocity", "lognorm", LOGIT_T),
    "rf/mode": FormulationKind("rectified", "velocity", "mode", SCALE),
    "eps/linear": FormulationKind("linear", "noise", "steps"),
    "v/linear": FormulationKind("linear", "v", "steps"),
    "eps/cos": FormulationKind("cosine-early", "noise", "uniform"),
    "v/cos": FormulationKind("cosine", "v", "uniform"),
    "edm": FormulationKind("edm", "f", "lognorm", LN_SIGMA),
    "edm/rf": FormulationKind("edm", "f", "uniform"),
    "edm/cos": FormulationKind("edm", "f", "cosmap"),
    EDM_RF_WEIGHT: FormulationKind("edm-shifted", "f", "cosmap"),
}


def _printed(kind: str, rows: Iterable[tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    return {f"{kind}({','.join(f'{number:.2f}' for number in row)})": row for row in rows}


# The paper's 61 as its tables print them, with their numbers: rf/mode(1.29) is -1 + 2.75 * 5 / 6 = 1.291667.
PAPER: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("rf", "rf/cosmap"), ()),
    **_printed("rf/lognorm", ((m, s) for m in (-1.0, -0.5, 0.0, 0.5, 1.0) for s in (0.2, 0.6, 1.0, 1.4, 1.8, 2.2))),
    **_printed("rf/mode", ((scale,) for scale in (*(-1 + 2.75 * i / 6 for i in range(7)), 1.0))),
    **dict.fromkeys(("eps/linear", "v/linear", "eps/cos", "v/cos"), ()),
    **_printed("edm", ((m, s) for m in (-1.2, -0.6, 0.0, 0.6, 1.2) for s in (0.6, 1.2, 1.8))),
    **dict.fromkeys(("edm/rf", "edm/cos"), ()),
}
FORMULATION_NAMES = tuple(PAPER)


def read_name(name: str) -> tuple[str, tuple[float, ...]]:
    """(canonical name, its numbers). Equal formulations have one name, the paper's where it has one: rf/lognorm(0,1) is
    rf/lognorm(0.00,1.00), and rf/mode(0.375) is rf/mode(0.38). Numbers have two decimals, more where they need them.

    Raises ValueError that says what is wrong with the name.
    """
    kind, numbers = _split(name)
    for number, bounds in zip(numbers, FORMULATION_KINDS[kind].numbers, strict=True):
        if not bounds.low <= number <= bounds.high:
            raise ValueError(
                f"formulation {name!r}: its {bounds.meaning}, {number:g}, is not between {bounds.low:g} and {bounds.high:g}"
            )
    if not numbers:
        return kind, ()
    canonical = f"{kind}({','.join(map(_print_number, numbers))})"
    if canonical in PAPER:
        return canonical, PAPER[canonical]
    same = (paper for paper, own in PAPER.items() if own == numbers and paper.startswith(f"{kind}("))
    return next(same, canonical), numbers


def canonical_name(name: str) -> str:
    """The one name that a formulation has in fingerprints and checkpoints. Raises ValueError as `read_name` does."""
    return read_name(name)[0]


def formulation_version(name: str) -> int:
    """The version of what a known name stands for."""
    return FORMULATION_KINDS[_kind_of(name)].version


def family(name: str) -> str:
    """Formulations of one family ask the same of a network: its weights can go on from one to the other.

    "rf" (velocity), "edm" (F behind EDM's scaling); eps/linear, v/linear, eps/cos and v/cos are each their own.
    """
    kind = FORMULATION_KINDS.get(_kind_of(name))
    return {"velocity": "rf", "f": "edm"}.get(kind.predicts, name) if kind else name


def export_problem(name: str) -> str | None:
    """Why diffusers' SD3 pipeline cannot sample a model of this formulation; None where it can.

    It hands the network z_t and 1000 t, and takes the output for the velocity noise - x0.
    """
    if family(name) == "rf":
        return None
    return f"diffusers' SD3 pipeline samples rectified flow only, not {name}; sd3 sample draws from the checkpoint"


def shift_problem(name: str, shift: float) -> str | None:
    """What is wrong with a resolution shift for this formulation; None where it has a meaning."""
    if shift == 1 or FORMULATION_KINDS[_kind_of(name)].path != "linear":
        return None
    return f"{name} has a fixed table of noise levels, which shift {shift:g} would leave; take shift 1"


def _kind_of(name: str) -> str:
    return name.partition("(")[0].strip()


def _split(name: str) -> tuple[str, tuple[float, ...]]:
    """(kind, numbers) as they are written. Raises ValueError for what is no formulation."""
    number = r"\s*([+-]?\d+\.?\d*(?:[eE][+-]?\d+)?)\s*"
    found = re.fullmatch(rf"\s*([^()]*?)\s*(?:\({number}(?:,{number})?\))?\s*", name, re.ASCII)
    kind = found.group(1) if found else _kind_of(name)
    if kind not in FORMULATION_KINDS:
        near = difflib.get_close_matches(kind, FORMULATION_KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(f"formulation {name!r} is not known; did you mean {_form(near)!r}?")
    numbers = tuple(float(text) for text in (found.groups()[1:] if found else ()) if text)
    if not found or len(numbers) != len(FORMULATION_KINDS[kind].numbers):
        raise ValueError(f"formulation {name!r} cannot be read; write {_form(kind)}{_bounds(kind)}")
    return kind, numbers


def _form(kind: str) -> str:
    letters = ",".join(number.letter for number in FORMULATION_KINDS[kind].numbers)
    return f"{kind}({letters})" if letters else kind


def _bounds(kind: str) -> str:
    said = [f"{n.letter} from {n.low:g} to {n.high:g}" for n in FORMULATION_KINDS[kind].numbers]
    return f" with {' and '.join(said)}" if said else ""


def _print_number(number: float) -> str:
    """-0.0 and 0.0 are one."""
    short = f"{number + 0.0:.2f}"
    return short if float(short) == number else repr(number)
