"""The weights a phase starts from: fresh, or a checkpoint's.

QK-norm is inserted where the phase is the first to have it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sd3core.checkpoint import Checkpoint, model_shapes, open_checkpoint
from sd3core.errors import CheckpointError
from sd3core.formulation_names import family
from sd3core.mmdit import BackboneConfig, config_from_dict, make_model
from sd3core.mmdit.backbone import config_positions
from sd3core.mmdit.qk_norm import fitted_scale, inserted_norms, norms_passed_by
from workers.trainer.job import TrainingJob

POSITION_TOLERANCE = 1e-2  # a table in bf16
POSITIONS = "pos_embed"  # made anew for each phase's resolution
QK_NORM_SCALES = (".ln_q.weight", ".ln_k.weight")  # the only parameters that may be new in a later phase


@dataclass(frozen=True)
class Start:
    """Whole fp32 weights of every parameter, and which of them the checkpoint did not have: scales of QK-norm, all one."""

    weights: dict[str, Tensor]
    new: frozenset[str]


def start_weights(job: TrainingJob) -> Start:
    """The weights before the first step, a function of the job alone: fresh, or the weights (EMA) of `job.init`.

    Raises CheckpointError where those are another model's.
    """
    torch.manual_seed(job.seed)
    config = config_from_dict(job.model)
    fresh = dict(make_model(config).named_parameters())
    if job.init is None:
        return Start(fresh, frozenset())
    init = check_start(job.phase, job.init, config, job.training.formulation).model()
    if not torch.allclose(init.pos_embed.float(), config_positions(init.config), atol=POSITION_TOLERANCE):
        raise CheckpointError(
            f"{job.phase} starts from {job.init}: its position table follows no grid, so it cannot be made for another"
            " resolution"
        )
    stored = dict(init.named_parameters())
    new = frozenset(fresh.keys() - stored.keys())
    weights = {name: (fresh[name] if name in new else stored[name]).detach().float() for name in fresh}
    return Start(weights, new)


def check_start(phase: str, init: str, config: BackboneConfig, formulation: str) -> Checkpoint:
    """`init`, opened. CheckpointError where it is no start for such a phase, as far as can be told without its weights."""
    where, opened = f"{phase} starts from {init}", open_checkpoint(init)
    if family(opened.formulation) != family(formulation):
        raise CheckpointError(
            f"{where}: it was trained for {opened.formulation}, whose network predicts another thing than {formulation}'s"
        )
    stored = opened.config
    for name in ("num_heads", "position_base", "clip_tokens"):  # no parameter's shape tells these
        found, wanted = getattr(stored, name, None), getattr(config, name, None)
        if found != wanted:
            raise CheckpointError(f"{where}: {name} is {found} there and {wanted} in the recipe's model")
    there, here = model_shapes(stored), model_shapes(config)
    new = {name for name in here.keys() - there.keys() if name.endswith(QK_NORM_SCALES)}
    for name in sorted((here.keys() | there.keys()) - new - {POSITIONS}):
        found, wanted = there.get(name, "absent"), here.get(name, "absent")
        if found != wanted:
            raise CheckpointError(f"{where}: {name} is {found} there and {wanted} in the recipe's model")
    return opened


def fitted_scales(model: nn.Module, new: frozenset[str], forward: Callable[[], None]) -> dict[str, Tensor]:
    """Scales for the new norms with which the first forward is as near as can be to that of the model without them.

    `forward` runs this rank's part of a batch through the model; the sums are over all ranks' parts, so the number of
    ranks changes nothing but their order. All ranks call it.
    """
    # At ZeRO 3 the model is the engine around the module.
    norms = {name.removeprefix("module."): norm for name, norm in inserted_norms(model)}
    norms = {name: norm for name, norm in norms.items() if f"{name}.weight" in new}
    with norms_passed_by(norms) as sums, torch.no_grad():
        forward()
    for name in sums:
        dist.all_reduce(sums[name])
    return {f"{name}.weight": fitted_scale(total).cpu() for name, total in sums.items()}
