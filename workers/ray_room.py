"""Compares what a recipe asks with what Ray's nodes have.

Ray itself would wait for ever, in silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sd3core.recipe import Compute

SLACK = 1e-6  # of Ray's fixed-point numbers
WITHOUT_BF16 = {"K80", "M60", "P4", "P40", "P100", "V100", "T4"}  # GPUs of data centres before Ampere


@dataclass(frozen=True)
class Node:
    """One machine of Ray: all that it has, whoever uses it now."""

    name: str  # its address
    cpus: float
    gpus: float
    gpu_kinds: tuple[str, ...] = ()  # as Ray names them: "H100", "V100"

    def holds(self, cpus: float, gpus: float) -> float:
        """How many processes that want so much it has room for."""
        counts = [(have + SLACK) // want for have, want in ((self.cpus, cpus), (self.gpus, gpus)) if want > 0]
        return min(counts, default=math.inf)


class AskedOfRay(Protocol):
    """What a stage's actors ask for: `Compute.for_stage`, or a pool's settings."""

    cpus_per_actor: float
    gpus_per_actor: float
    autoscaling: bool

    def key(self, name: str) -> str: ...


def actors_problem(compute: AskedOfRay, nodes: Sequence[Node]) -> str | None:
    """Why no actor of this stage would ever start on these nodes, in one line; None where one would."""
    return _one_process(compute, "actor", nodes)


def ranks_problem(compute: Compute, nodes: Sequence[Node]) -> str | None:
    """Why the ranks of this recipe would never all start on these nodes, in one line; None where they would."""
    if compute.autoscaling:
        return None
    for unit, key, want in _wants(compute, "rank"):
        have = sum(getattr(node, f"{unit.lower()}s") for node in nodes)
        if compute.train_ranks * want > have + SLACK:
            return (
                f"compute.train_ranks {compute.train_ranks} x {key} {want:g} is more than the {have:g} {unit}s"
                f" that Ray has; lower one of them, or {GROWS}"
            )
    if problem := _one_process(compute, "rank", nodes):
        return problem
    room = sum(node.holds(compute.cpus_per_rank, compute.gpus_per_rank) for node in nodes)
    if compute.train_ranks > room:
        asked = " and ".join(f"{key} {want:g}" for _, key, want in _wants(compute, "rank"))
        return (
            f"compute.train_ranks {compute.train_ranks}: the nodes of Ray hold {room:g} such ranks ({asked}), each whole on one"
            f" node; lower one of them, or {GROWS}"
        )
    return None


def gpus_have_bf16(nodes: Sequence[Node], autoscaling: bool) -> bool:
    """Whether the GPUs of these nodes have arithmetic for bf16. A kind that Ray does not name is taken to have it, and so is
    one that a cluster will add: in bf16 the bytes are right on any, only an old one is slow.
    """
    with_gpus = [node for node in nodes if node.gpus > 0]
    return bool(with_gpus or autoscaling) and not any(WITHOUT_BF16 & set(node.gpu_kinds) for node in with_gpus)


GROWS = "set compute.autoscaling where the cluster adds nodes by itself"


def _wants(compute: AskedOfRay | Compute, process: str) -> list[tuple[str, str, float]]:
    """(unit, the recipe's key, amount) of what one actor or rank asks for."""
    names = [(unit, f"{unit.lower()}s_per_{process}") for unit in ("CPU", "GPU")]
    return [(unit, compute.key(name), getattr(compute, name)) for unit, name in names if getattr(compute, name) > 0]


def _one_process(compute: AskedOfRay | Compute, process: str, nodes: Sequence[Node]) -> str | None:
    """Why no node holds one such process."""
    wants = _wants(compute, process)
    if compute.autoscaling or any(node.holds(*_amounts(compute, process)) >= 1 for node in nodes):
        return None
    for unit, key, want in wants:
        most = max(nodes, key=lambda node: getattr(node, f"{unit.lower()}s"), default=Node("none", 0, 0))
        have = getattr(most, f"{unit.lower()}s")
        if want > have + SLACK:
            where = f" ({most.name})" if have else ""
            return f"{key} {want:g} is more than the {have:g} {unit}s that the largest node of Ray has{where}; lower it, or {GROWS}"
    asked = " and ".join(f"{key} {want:g}" for _, key, want in wants)
    return f"{asked}: no single node of Ray has both; lower one of them, or {GROWS}"


def _amounts(compute: AskedOfRay | Compute, process: str) -> tuple[float, float]:
    return getattr(compute, f"cpus_per_{process}"), getattr(compute, f"gpus_per_{process}")
