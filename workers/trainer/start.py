"""The weights a phase starts from, and the data it reads: everything a rank opens once."""

from __future__ import annotations

import torch

from sd3core.checkpoint import DONE_FILE, assemble, load_model
from sd3core.data.store import Store
from sd3core.errors import CheckpointError
from sd3core.mmdit import MMDiT, MMDiTConfig
from workers.trainer.job import TrainingJob

QK_NORM_SCALES = (".ln_q.weight", ".ln_k.weight")  # the only parameters that may be new in a later phase


def start_model(job: TrainingJob, store: Store) -> MMDiT:
    """The model before its first step, a function of the job alone: fresh, or the EMA weights of `job.init`.

    Under the phase's own config: its position table, and QK-norm scales of one where the checkpoint has none.
    """
    torch.manual_seed(job.seed)
    model = MMDiT(MMDiTConfig.from_dict(job.model))
    if job.init is None:
        return model
    where = store.uri(job.init)
    if store.exists(f"{job.init}/{DONE_FILE}"):
        weights = assemble(store, job.init, "ema")
    else:
        weights = dict(load_model(where).named_parameters())
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name in sorted(wanted.keys() | weights.keys()):
        if name in wanted and name not in weights and name.endswith(QK_NORM_SCALES):
            continue
        found = tuple(weights[name].shape) if name in weights else "absent"
        if found != wanted.get(name, "absent"):
            raise CheckpointError(
                f"{job.phase} starts from {where}: {name} is {found} there and {wanted.get(name, 'absent')}"
                " in the recipe's model"
            )
    model.load_state_dict({name: tensor.detach().float() for name, tensor in weights.items()}, strict=False)
    return model
