"""Draws latents of the same few captions and noise on all ranks together.

They become the pictures that a phase shows while it trains.

Ranks have no VAE and write latents, runs/RUN/previews/PHASE-SPEC/SAMPLES.safetensors: a tensor a caption, and as metadata the
captions, their rows' keys, whether the phase trains on them (splits), and the settings. Training is as it would be without: noise is drawn by (seed, sample), weights are only read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from sd3core import randomness
from sd3core.conditioning import ENCODERS, TextFeatures, join_features
from sd3core.data.store import Store
from sd3core.data.stored_text import StoredText
from sd3core.errors import UserError
from sd3core.formulations import find_formulation
from sd3core.sample_settings import best_schedule
from sd3core.sampling import guided, solve
from workers.trainer.job import TrainingJob

FIRST_STEP = 64

PreviewModel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (z_in, t_in, context, pooled) -> output


class Samples(Protocol):
    """A few samples of one bucket."""

    latent: Tensor  # (B, 16, h, w), for its shape
    text: StoredText
    sample_ids: np.ndarray  # (B,) int64
    keys: list[str]


class Previews:
    """Every rank holds one and calls `draw` together with the others. Rank 0 reads, writes and warns.

    read() gives the samples to draw, once; it and the store may fail: then a warning says so and training goes on.
    """

    def __init__(
        self,
        job: TrainingJob,
        store: Store,
        null: TextFeatures | None,
        device: torch.device,
        read: Callable[[], Sequence[Samples]],
        warn: Callable[[str], None],
    ):
        self.job, self.store, self.null, self.device = job, store, null, device
        self._read, self._warn = read, warn
        self._samples: Sequence[Samples] | None = None

    def due(self, step: int) -> bool:
        """Whether pictures are due: after 64, 128, 256, ... steps and at the end, so early, and a small share of the time."""
        power_of_two = step >= FIRST_STEP and step & (step - 1) == 0
        return self.job.previews is not None and (power_of_two or step == self.job.total_steps)

    def draw(self, model: PreviewModel, samples_seen: int) -> str | None:
        """The path of what was written; None on other ranks, and where there is nothing to draw or it failed."""
        if self._samples is None:
            read: list[Any] = [self._on_first_rank(self._read)]
            dist.broadcast_object_list(read, src=0)
            self._samples = read[0] or []
        latents = draw_latents(model, self.job, self._samples, self.null, self.device)
        return self._on_first_rank(lambda: self._write(samples_seen, latents)) if latents else None

    def _write(self, samples_seen: int, latents: dict[str, Tensor]) -> str:
        job, settings = self.job, self.job.previews.model_dump(exclude={"captions"})
        shown = [caption for caption in job.previews.captions if caption.key in latents]
        tensors = {f"{place:03d}": latents[caption.key].contiguous() for place, caption in enumerate(shown)}
        facts = {"phase": job.phase, "samples": samples_seen, "weights": "live"}
        rows = {
            f"{name}s": json.dumps([getattr(caption, name) for caption in shown])
            for name in ("caption", "key", "split")
        }
        path = f"{job.previews_folder}/{samples_seen:012d}.safetensors"
        self.store.put(path, save(tensors, rows | {"settings": json.dumps(facts | settings)}))
        return path

    def _on_first_rank(self, call: Callable[[], Any]) -> Any:
        if dist.get_rank() != 0:
            return None
        try:
            return call()
        except UserError as error:
            self._warn(f"pictures while training: {error}")
            return None


@torch.no_grad()
def draw_latents(
    model: PreviewModel, job: TrainingJob, batches: Sequence[Samples], null: TextFeatures | None, device: torch.device
) -> dict[str, Tensor]:
    """Key -> latent (16, h, w) of every sample, on all ranks. Each rank draws its share of every batch.

    A rank without a share draws the first row once more: under ZeRO 3 all ranks must call the model equally often.
    """
    rank, world, settings = dist.get_rank(), dist.get_world_size(), job.previews
    formulation = find_formulation(job.training.formulation).shifted(settings.shift)
    sigmas, drawn = formulation.sigmas(settings.num_steps, best_schedule(settings.sampler)), {}
    for batch in batches:
        rows = list(range(rank, len(batch.keys), world)) or [0]
        text = batch.text.index(rows).features(device)
        nothing = torch.zeros(len(rows), len(ENCODERS), dtype=torch.bool)
        cond = join_features(text, None, null, job.model["context_dim"])
        uncond = join_features(text, nothing, null, job.model["context_dim"])
        predict = guided(
            lambda z, t, cond=cond: model(z, t, *cond),
            lambda z, t, uncond=uncond: model(z, t, *uncond),
            settings.guidance_scale,
        )
        fresh = partial(next, _noises(job, batch.sample_ids[rows], batch.latent.shape[1:], device))
        start, velocity = formulation.start(fresh()), formulation.as_rectified_flow(predict)
        latents = solve(settings.sampler, velocity, start, sigmas, fresh=fresh).cpu()  # (rows, 16, h, w)
        drawn |= {batch.keys[row]: latent for row, latent in zip(rows, latents, strict=True)}
    parts: list[dict[str, Tensor]] = [{}] * world
    dist.all_gather_object(parts, drawn)
    return {key: latent for part in parts for key, latent in part.items()}


def _noises(job: TrainingJob, ids: np.ndarray, shape: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """One draw of the samples' own noise (rows, *shape) after the other."""
    for draw in count():
        yield torch.from_numpy(randomness.normal(job.seed, draw, ids, "preview", shape)).to(device)
