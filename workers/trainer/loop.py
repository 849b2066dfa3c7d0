"""The training loop of one rank. Step N is a function of the job and N alone: data, timesteps, noise and dropout are
drawn by (seed, epoch, sample), so a restart or another number of ranks changes nothing but the order of summation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sd3core import conditioning, moving_average, randomness
from sd3core.checkpoint_record import DamagedFile
from sd3core.conditioning import TextFeatures
from sd3core.data.encoded_shards import read_null_bytes
from sd3core.data.store import Store, open_store
from sd3core.data.stored_text import StoredText
from sd3core.formulations import Formulation, find_formulation
from sd3core.mmdit import config_from_dict, make_model, max_attention_logit, use_lean_steps
from sd3core.precision import PRECISION_DTYPES, has_bf16_arithmetic
from workers.trainer import engine
from workers.trainer.checkpointing import begin_attempt, load_checkpoint, load_start_weights, save_checkpoint
from workers.trainer.engine import ShardedTrainer
from workers.trainer.job import TrainingFailed, TrainingJob
from workers.trainer.metrics import StepClock, StepLoss, flops_per_sample, learning_rate, peak_flops
from workers.trainer.previews import Previews
from workers.trainer.records import Records
from workers.trainer.standing_checkpoints import last_whole_checkpoint, passed_over
from workers.trainer.start import fitted_scales, start_weights

NON_FINITE_IN_A_ROW = 5  # then training goes back to the last checkpoint
GO_BACKS = 2  # then it fails
MICRO_BATCHES_AHEAD = 2  # whose inputs are drawn while one computes
LOGIT_SAMPLES = 2  # of a rank's micro batch, for the attention-logit maximum


class TrainingBatch(Protocol):
    """A micro batch: B samples of this rank's contiguous part of a global batch, all of one bucket."""

    latent: Tensor  # (B, 16, h, w), in the precision it is stored in
    text: StoredText
    sample_ids: np.ndarray  # (B,) int64
    epochs: np.ndarray  # (B,)
    keys: list[str]
    bucket: str


class Loader(Protocol):
    """`batch` is asked for one micro batch after the other: `part` counts them within the step, both from 0."""

    def batch(self, step: int, part: int) -> TrainingBatch: ...
    def samples(self, wanted: Iterable[tuple[int, str]]) -> list[TrainingBatch]: ...


@dataclass(frozen=True)
class RankContext:
    """Where a rank runs."""

    rank: int
    world: int
    device: torch.device
    threads: int
    cache_bytes: float = 2e9  # on this machine's disk
    decoded_bytes: float = 2e9  # read ahead, in this rank's memory
    loader_process: bool = False  # read and decode in a process beside this one


class Watcher(Protocol):
    """Who is told how training goes; rank 0 tells."""

    def began(self, attempt: int, samples: int) -> None: ...
    def progress(self, samples: int, note: str, loss: float | None) -> None: ...
    def preview(self, path: str) -> None: ...
    def warn(self, message: str) -> None: ...


Warn = Callable[[str], None]
OpenLoader = Callable[[TrainingJob, Store, RankContext, Warn], Loader]


class NonFiniteStreak(Exception):
    """Too many steps in a row whose loss or gradient was not finite."""


@dataclass(frozen=True)
class MicroBatch:
    """The inputs of one forward pass of a rank, on its device. Whatever they were made of can be let go of."""

    x0: Tensor  # (B, 16, h, w)
    noise: Tensor  # (B, 16, h, w)
    t: Tensor  # (B,) in [0, 1], 1 = noise: the shifted formulation's
    context: Tensor  # (B, L, context_dim)
    pooled: Tensor  # (B, pooled_dim)
    keys: list[str]
    bucket: str

    def first(self, count: int) -> MicroBatch:
        """A copy of the first few samples."""
        tensors = (self.x0, self.noise, self.t, self.context, self.pooled)
        return MicroBatch(*(z[:count].clone() for z in tensors), self.keys[:count], self.bucket)


def draw_inputs(batch: TrainingBatch, job: TrainingJob, null: TextFeatures | None, device: torch.device) -> MicroBatch:
    """t = quantile(u) of the shifted formulation, noise ~ N(0, 1), encoders dropped with text dropout's two probabilities.

    Every draw is by (seed, epoch, sample). Latents and text travel to the device as they are stored.
    """
    training, drawn_by = job.training, (job.seed, batch.epochs, batch.sample_ids)
    u = torch.from_numpy(randomness.uniform(*drawn_by, "timestep"))  # float64
    t = _formulation(job).quantile(u)
    noise = torch.from_numpy(randomness.normal(*drawn_by, "noise", batch.latent.shape[1:]))
    keep = ~conditioning.drop_mask(*drawn_by, training.text_dropout, training.text_dropout_together)
    text = batch.text.features(device)
    context, pooled = conditioning.join_features(text, keep.to(device), null, job.model["context_dim"])
    x0, noise, t = batch.latent.to(device).float(), noise.to(device), t.float().to(device)
    return MicroBatch(x0, noise, t, context, pooled, batch.keys, batch.bucket)


class PhaseTraining:
    """One attempt at one phase, on one rank. The process group stands already."""

    def __init__(self, job: TrainingJob, place: RankContext, watcher: Watcher, open_loader: OpenLoader):
        self.job, self.place, self.watcher = job, place, watcher
        self.store = open_store(job.store)
        self.attempt = self._from_first_rank(lambda: begin_attempt(self.store, job.folder))
        self.config = config_from_dict(job.model)
        self.formulation = _formulation(job)
        null = self._from_first_rank(lambda: read_null(self.store, job))
        self.null = null and null.to(place.device)
        self.loader = open_loader(job, self.store, place, self._warn)
        self.previews = Previews(job, self.store, self.null, place.device, self._shown_samples, self._warn)
        model = make_model(self.config).to(place.device)  # its weights do not matter: `_restore` sets them
        use_lean_steps(model)
        self.trainer = ShardedTrainer(model, job.training, place.rank, place.world)
        self.peak, _ = peak_flops(place.device, PRECISION_DTYPES[job.training.precision])

    def run(self) -> None:
        """Trains from the last checkpoint to the end of the phase."""
        for go_back in range(GO_BACKS + 1):
            step = self._restore()
            try:
                with Records(self.job, self.store, self.place.rank, self.attempt, step) as self.records:
                    self._train_from(step)
                return
            except NonFiniteStreak as streak:
                if go_back == GO_BACKS:
                    raise TrainingFailed(
                        f"{self.job.phase}: {streak}, again after going back {GO_BACKS} times;"
                        f" lower {self.job.phase}.learning_rate or look at the batches named in the warnings"
                    ) from None
                self._warn(f"{streak}; going back to the last checkpoint")

    def _restore(self) -> int:
        """Loads the last whole checkpoint, or the start weights; returns the number of steps taken until then."""
        step = self._load_last(self.job.last_samples)
        if self.place.rank == 0:
            self.watcher.began(self.attempt, self.job.samples_at(step))
        return step

    def _load_last(self, last_samples: int) -> int:
        find = partial(last_whole_checkpoint, self.store, self.job.folder, self._warn, last_samples)
        last = self._from_first_rank(find)
        if last is None:
            self._load_start()
            return 0
        try:
            return load_checkpoint(self.store, last.folder, self.trainer, partial(self._say, last.samples)).steps
        except DamagedFile as error:
            self._warn(passed_over(error.damage))
        return self._load_last(last.samples - 1)

    def _load_start(self) -> None:
        start = start_weights(self.job)
        load_start_weights(start.weights, self.trainer)
        if start.new and self.job.training.qk_norm_start == "fitted":
            scales = fitted_scales(self.trainer.model, start.new, self._forward_first_step)
            load_start_weights(start.weights | scales, self.trainer)

    def _forward_first_step(self) -> None:
        for part in range(self._parts):
            self._losses_of(self._draw(0, part), self.trainer.model)

    def _train_from(self, first: int) -> None:
        self.clock = StepClock()
        with closing(self._inputs_from(first)) as inputs:
            self._take_steps(first, inputs)

    def _take_steps(self, first: int, inputs: Iterator[MicroBatch]) -> None:
        job, streak, checkpoint_due = self.job, 0, False
        for step in range(first + 1, job.total_steps + 1):
            row, shown = self._take_step(step, islice(inputs, self._parts))
            streak = streak + 1 if "warning" in row else 0
            if moving_average.changes_average(job.training, step):
                self.trainer.update_ema(moving_average.decay_at(job.training, step))
            checkpoint_due |= job.is_checkpoint_step(step)
            ends_here = checkpoint_due and (not streak or step == job.total_steps)
            if ends_here:
                row["attention_logit_max"] = self._attention_logit_max(shown)
            self.records.add(row)
            if streak == NON_FINITE_IN_A_ROW:
                raise NonFiniteStreak(f"{streak} steps in a row without a finite gradient up to step {step}")
            if ends_here:
                self._tell(row, ", writing a checkpoint")
                rows = self.records.since_checkpoint
                with self.clock.spending("checkpoint_s"):
                    save_checkpoint(
                        self.store, job, self.trainer, attempt=self.attempt, step=step, rows=rows, warn=self._warn
                    )
                self.records.checkpoint_stands()
                checkpoint_due = False
            if self.previews.due(step):
                self._tell(row, ", drawing pictures")
                if path := self.previews.draw(self.trainer.model, row["samples"]):
                    self.watcher.preview(path)
            self._tell(row)

    def _shown_samples(self) -> list[TrainingBatch]:
        return self.loader.samples((shown.shard, shown.key) for shown in self.job.previews.captions)

    @property
    def _parts(self) -> int:
        """Micro batches of a rank's step."""
        training = self.job.training
        return training.global_batch // (training.micro_batch * self.place.world)

    def _draw(self, step: int, part: int) -> MicroBatch:
        return draw_inputs(self.loader.batch(step, part), self.job, self.null, self.place.device)

    def _inputs_from(self, first: int) -> Iterator[MicroBatch]:
        """The micro batches of every step after `first`; a thread draws those ahead."""
        numbers = product(range(first, self.job.total_steps), range(self._parts))
        with ThreadPoolExecutor(1, thread_name_prefix="inputs") as thread:
            ahead = deque(thread.submit(self._draw, *number) for number in islice(numbers, MICRO_BATCHES_AHEAD))
            while ahead:
                with self.clock.spending("wait_s"):
                    inputs = ahead.popleft().result()
                ahead.extend(thread.submit(self._draw, *number) for number in islice(numbers, 1))
                yield inputs

    def _take_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> tuple[dict[str, Any], MicroBatch]:
        """One update of the weights; returns its row, and a few samples that it has seen.

        Where the gradient is not finite the update is left out.
        """
        training = self.job.training
        lr = learning_rate(training, self.job.samples_at(step - 1))
        step_loss, norm, seen, shown = StepLoss(self.place.device), None, [], None
        for inputs in micro_batches:
            losses = self._losses_of(inputs, self.trainer)  # (B,)
            self.trainer.backward(losses.mean())
            norm = self.trainer.step(lr)
            step_loss.add(losses, self.formulation.rf_time(inputs.t))
            seen.append((inputs.keys, losses.detach()))
            shown = shown or inputs.first(LOGIT_SAMPLES)
        assert shown and norm is not None, "the micro batches of a step end on an accumulation boundary"
        dist.all_reduce(step_loss.totals)

        row: dict[str, Any] = {"samples": self.job.samples_at(step), "step": step, "lr": lr}
        row["bucket"] = shown.bucket
        if math.isfinite(norm):
            row |= step_loss.row() | {"grad_norm": norm}
        else:
            row |= self._name_bad_samples(step, seen, losses_finite=bool(step_loss.totals.isfinite().all()))
        seconds, spent = self.clock.end_step(self.place.device)
        rate = training.global_batch / seconds
        tokens = shown.x0[0, 0].numel() // self.config.patch_size**2
        flops = flops_per_sample(self.config, tokens, shown.context.shape[1])
        row |= spent | {"samples_per_s": rate, "mfu": rate * flops / (self.peak * self.place.world)}
        return row, shown

    def _name_bad_samples(
        self, step: int, seen: list[tuple[list[str], Tensor]], *, losses_finite: bool
    ) -> dict[str, Any]:
        """The part of a row that says which samples gave a step without a finite gradient. All ranks call it.

        seen: keys and losses (B,) of this rank's micro batches.
        """
        keys = np.array([key for part, _ in seen for key in part])
        if not losses_finite:
            keys = keys[~torch.cat([losses for _, losses in seen]).isfinite().cpu().numpy()]
        gathered: list[list[str]] = [[]] * self.place.world
        dist.all_gather_object(gathered, [str(key) for key in keys])
        named = [key for part in gathered for key in part]
        what = "gradient" if losses_finite else "loss"
        warning = f"step {step}: {what} not finite, update left out; samples: {', '.join(named[:8])}"
        warning += f" and {len(named) - 8} more" if len(named) > 8 else ""
        self._warn(warning)
        return {"loss": None, "grad_norm": None, "warning": warning, "keys": named}

    def _losses_of(self, inputs: MicroBatch, model: Callable[..., Tensor]) -> Tensor:
        """The loss of each sample, (B,)."""
        predict = partial(_predict, model, inputs.context, inputs.pooled)
        return self.formulation.loss(predict, inputs.x0, inputs.noise, inputs.t)

    @torch.no_grad()
    def _attention_logit_max(self, shown: MicroBatch) -> float:
        z_t = self.formulation.add_noise(shown.x0, shown.noise, shown.t)
        z_in, t_in = self.formulation.network_inputs(z_t, shown.t)
        return float(max_attention_logit(self.trainer.model, z_in, t_in, shown.context, shown.pooled).max())

    def _tell(self, row: dict[str, Any], doing: str = "") -> None:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
        self._say(row["samples"], f"loss {loss}{doing}", None if doing else row["loss"])

    def _say(self, samples: int, note: str, loss: float | None = None) -> None:
        if self.place.rank == 0:
            self.watcher.progress(samples, note, loss)

    def _warn(self, message: str) -> None:
        if self.place.rank == 0:
            self.watcher.warn(f"{self.job.phase}: {message}")

    def _from_first_rank(self, call: Callable[[], Any]) -> Any:
        """What `call` gives on rank 0, on all ranks: a store that is being written may look different to each."""
        answer = [call() if self.place.rank == 0 else None]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]


def _formulation(job: TrainingJob) -> Formulation:
    return find_formulation(job.training.formulation).shifted(job.training.shift)


def _predict(model: Callable[..., Tensor], context: Tensor, pooled: Tensor, z_in: Tensor, t_in: Tensor) -> Tensor:
    return model(z_in, t_in, context, pooled)


def read_null(store: Store, job: TrainingJob) -> TextFeatures | None:
    """The features of the empty string where they stand for "no prompt", else None: zeros."""
    if job.text.null == "zeros":
        return None
    data = read_null_bytes(store, job.text_features.folder)
    return StoredText.from_bytes([data], clip_tokens=job.text.clip_tokens, t5_tokens=job.text.t5_tokens).features()


def train_rank(job: TrainingJob, place: RankContext, watcher: Watcher, open_loader: OpenLoader) -> None:
    """A rank's whole life."""
    torch.set_num_threads(place.threads)
    engine.prepare(use_gpu=place.device.type == "cuda")
    training = engine.settle_precision(job.training, place.device)
    if place.rank == 0 and training.precision == "bf16" and not has_bf16_arithmetic(place.device):
        watcher.warn(
            f"{job.phase}.precision is bf16, for which this {place.device.type} has no arithmetic: fp32 is many times as"
            " fast, and auto takes it"
        )
    PhaseTraining(job.model_copy(update={"training": training}), place, watcher, open_loader).run()
