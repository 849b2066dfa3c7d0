"""DeepSpeed behind one small interface.

No other file imports it or knows its private attributes.

Pinned to deepspeed 0.19.8. ZeRO 1 and 2 keep one flat fp32 partition per parameter group, ZeRO 3 one per sub-group,
ZeRO 0 whole parameters; `HeldPart` is the common view of them: a part of one parameter, in a flat fp32 tensor.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from sd3core.mmdit import Backbone
from sd3core.precision import PRECISION_DTYPES, has_bf16_arithmetic, resolve_precision
from sd3core.recipe import Training
from sd3core.training_checkpoint import TENSOR_KINDS, Piece, TensorKind
from workers.trainer.muon import MatrixPiece, Muon, matrices_in


@dataclass(frozen=True)
class HeldPart:
    """Where this rank keeps elements [start, start + length) of parameter `name`, flattened."""

    name: str
    start: int
    length: int
    flat: Tensor  # fp32 master, the optimizer's parameter; flattened, the part is [offset, offset + length) of it
    offset: int

    def piece(self, kind: TensorKind, state: Tensor) -> Piece:
        """Of one kind of state, laid out as `flat`; its values are the state, not a copy."""
        return Piece(kind, self.name, self.start, state.view(-1).narrow(0, self.offset, self.length))


class ShardedTrainer:
    """A model under DeepSpeed with AdamW or Muon, accumulation, clipping and an fp32 EMA on each rank's partition.

    The forward pass has `training.precision`, which is settled; the masters are fp32.

    DeepSpeed rounds the fp32 masters of a fresh bf16 model to bf16: write exact ones through `pieces`.
    """

    def __init__(self, model: Backbone, training: Training, rank: int, world: int):
        self.training, self.rank, self.world = training, rank, world
        self.accumulation = training.global_batch // (training.micro_batch * world)
        self.shapes = {name: list(p.shape) for name, p in model.named_parameters()}
        if training.activation_checkpointing:
            for block in model.recomputable():
                block.forward = partial(recompute, block.forward, use_reentrant=False)
        self.engine = _initialize(model, training, self.accumulation)
        self._named = dict(self.engine.module.named_parameters())
        self.parts = list(self._find_parts())
        self.flats = list({id(part.flat): part.flat for part in self.parts}.values())
        self._make_state()
        if isinstance(self._adam, Muon):
            self._place_matrices(self._adam)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def model(self) -> nn.Module:
        """What to call for a forward pass."""
        return self.engine if self.training.zero_stage == 3 else self.engine.module

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        """loss: mean over a micro batch; DeepSpeed divides by the number of accumulated ones."""
        self.engine.backward(loss)

    def step(self, learning_rate: float) -> float | None:
        """Ends a micro batch; the last one of a step updates the weights and returns the gradient norm before clipping.

        inf or nan: the update was left out, on all ranks alike, and the gradients are gone.
        """
        last = self.engine.is_gradient_accumulation_boundary()
        if last:
            for group in self._adam.param_groups:
                group["lr"] = learning_rate
        if last and self.training.zero_stage == 0:
            norm = self._clip_unsharded()
            self.engine.step()
            return norm
        self.engine.step()
        if not last:
            return None
        return math.inf if self.engine.optimizer.overflow else float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """ema <- decay * ema + (1 - decay) * weights."""
        for flat, ema in zip(self.flats, self._ema, strict=True):
            ema.lerp_(flat.data, 1 - decay)

    @property
    def optimizer_step(self) -> int:
        """Updates made so far; left-out ones do not count."""
        return int(self._adam.state[self.flats[0]]["step"]) if self.flats else 0

    def pieces(self, own: bool = False) -> Iterator[Piece]:
        """Every part of the state that this rank holds; writing into its values changes the state (then call `loaded`).

        `own`: only what no other rank gives, so that all ranks' pieces together hold each element once.
        """
        for number, part in enumerate(self.parts):
            if own and self.training.zero_stage == 0 and number % self.world != self.rank:
                continue  # ZeRO 0: all ranks hold everything and take turns
            for kind in TENSOR_KINDS:
                yield part.piece(kind, self._state_of(part.flat, kind))

    @torch.no_grad()
    def loaded(self, optimizer_step: int) -> None:
        """Ends a change of the pieces: sets Adam's step and refreshes the weights of the forward pass. On all ranks."""
        for flat in self.flats:
            self._adam.state[flat]["step"].fill_(float(optimizer_step))
        self._refresh_forward_weights()

    def _state_of(self, flat: Tensor, kind: TensorKind) -> Tensor:
        if kind == "weights":
            return flat.data
        if kind == "ema":
            return self._ema[self._position[id(flat)]]
        return self._adam.state[flat][kind]

    def _make_state(self) -> None:
        """Adam's state and the EMA, which do not exist before a first step."""
        self._position = {id(flat): i for i, flat in enumerate(self.flats)}
        self._ema = [flat.detach().clone() for flat in self.flats]
        for flat in self.flats:
            self._adam.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(flat.data),
                "exp_avg_sq": torch.zeros_like(flat.data),
            }

    def _place_matrices(self, muon: Muon) -> None:
        """Tells Muon what each flat partition holds: this rank's whole matrices, and every one that is split between ranks."""
        own = {part.name: part for part in self.parts if matrices_in(part.name, self.shapes[part.name])}
        held: list[dict[str, tuple[int, int]]] = [{}] * self.world  # of every rank: name -> (group, length)
        dist.all_gather_object(held, {name: (self._group_of(part.flat), part.length) for name, part in own.items()})
        for group, flat in enumerate(self._group_flats()):
            placed = []
            for name, shape in self.shapes.items():
                lengths = [of_rank[name][1] for of_rank in held if name in of_rank and of_rank[name][0] == group]
                split = bool(lengths) and max(lengths) < math.prod(shape)
                if split or (lengths and name in own):
                    part = own.get(name)
                    place = (part.start, part.length, part.offset) if part else (0, 0, 0)
                    placed.append(MatrixPiece(tuple(shape), matrices_in(name, shape), *place, split))
            muon.place(flat, placed)

    def _group_flats(self) -> list[Tensor]:
        """The flat partitions by DeepSpeed's number, which is the same on all ranks."""
        stage, optimizer = self.training.zero_stage, self.engine.optimizer
        if stage == 0:
            return list(self._named.values())
        return list(optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat)

    def _group_of(self, flat: Tensor) -> int:
        return next(number for number, other in enumerate(self._group_flats()) if other is flat)

    @property
    def _adam(self) -> torch.optim.AdamW | Muon:
        return self.engine.optimizer if self.training.zero_stage == 0 else self.engine.optimizer.optimizer

    def _find_parts(self) -> Iterator[HeldPart]:
        stage, optimizer = self.training.zero_stage, self.engine.optimizer
        for name, p in self._named.items():
            if stage == 0:
                yield HeldPart(name, 0, p.numel(), p, 0)
            elif stage in (1, 2):
                if p._hp_mapping is not None:  # else this rank holds nothing of it
                    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    flat = optimizer.single_partition_of_fp32_groups[p._hp_mapping.param_group_index]
                    yield HeldPart(name, here.start, here.numel, flat, there.start)
            else:
                group, offset, width = optimizer.grad_position[optimizer.get_param_id(p)]
                length = min(width, p.ds_numel - self.rank * width)  # the tail of the last ranks is padding
                if length > 0:
                    flat = optimizer.fp32_partitioned_groups_flat[group]
                    yield HeldPart(name, self.rank * width, length, flat, offset)

    def _refresh_forward_weights(self) -> None:
        """Masters -> the weights of the forward pass, on all ranks (`refresh_fp32_params` would go the other way)."""
        optimizer = self.engine.optimizer
        if self.training.zero_stage in (1, 2):
            optimizer.update_lp_params()
        elif self.training.zero_stage == 3:
            optimizer.checkpoint_event_prologue()
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def _clip_unsharded(self) -> float:
        """ZeRO 0: clips here, for DeepSpeed would update with gradients that are not finite."""
        parameters = list(self._named.values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.training.grad_clip)
        if not torch.isfinite(norm):
            for p in parameters:
                p.grad = None
        return float(norm)


def settle_precision(training: Training, device: torch.device) -> Training:
    """`training` with bf16 or fp32 for `auto`; fp32 where any rank's device has no arithmetic for bf16. On all ranks."""
    able = torch.tensor(float(has_bf16_arithmetic(device)), device=device)
    dist.all_reduce(able, op=dist.ReduceOp.MIN)
    return training.model_copy(update={"precision": resolve_precision(training.precision, bf16=bool(able))})


def prepare(use_gpu: bool) -> None:
    """DeepSpeed's part of the process group that Ray Train has made. Compiles nothing."""
    import deepspeed

    # An unset op counts as incompatible. Otherwise the shared-memory op is compiled here for half a minute.
    if not use_gpu:
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def _initialize(model: nn.Module, training: Training, accumulation: int):
    import deepspeed

    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "lr": training.learning_rate,
        "betas": training.betas,
        "eps": training.adam_eps,
        "weight_decay": training.weight_decay,
    }
    if training.optimizer == "muon":
        optimizer = Muon(
            parameters, **settings, matrix_rate=training.matrix_rate, dtype=PRECISION_DTYPES[training.precision]
        )
    else:
        optimizer = torch.optim.AdamW(parameters, **settings, foreach=False)
    elements = sum(p.numel() for p in parameters)
    bucket = min(elements, 200_000_000)  # DeepSpeed allocates a whole bucket, 1 GB by default
    zero = {"stage": training.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if training.zero_stage == 3:
        zero |= {"stage3_prefetch_bucket_size": min(elements, 50_000_000)}
    config = {
        "train_batch_size": training.global_batch,
        "train_micro_batch_size_per_gpu": training.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if training.zero_stage == 0 else training.grad_clip,
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if training.precision == "bf16" and training.zero_stage >= 2 and accumulation > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine
