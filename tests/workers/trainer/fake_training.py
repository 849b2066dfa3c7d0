"""A synthetic data set with the loader's interface: every batch is a function of the step, as the real plan's are."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from sd3core.conditioning import TextFeatures
from sd3core.data.manifest import ManifestRef
from sd3core.data.stored_text import StoredText
from sd3core.mmdit import MMDiTConfig
from sd3core.recipe import Text, Training
from workers.trainer.job import TrainingJob

IMAGES = 40
UNTIMED = ("samples_per_s", "mfu", "wait_s", "checkpoint_s")  # of a step's row: what another run has otherwise
TOKENS, CLIP_WIDTH, T5_WIDTH = 4, 8, 24
MODEL = MMDiTConfig.from_depth(2, context_dim=24, pooled_dim=16, position_base=4, position_side=4, position_max=8)


@dataclass(frozen=True)
class FakeBatch:
    latent: torch.Tensor
    text: StoredText
    sample_ids: np.ndarray
    epochs: np.ndarray
    keys: list[str]
    bucket: str = "64x64"


@dataclass(frozen=True)
class FakeLoader:
    """`micro_batch`: rows of a part; None makes one part of a rank's whole slice. `nan_steps`: steps (from 0) whose first
    sample has a NaN in its latent. `stuck_at`: the step whose batch never comes, `slow_at`: the one whose batch takes `slow_s`.
    """

    global_batch: int
    rank: int
    world: int
    micro_batch: int | None = None
    nan_steps: tuple[int, ...] = ()
    stuck_at: int | None = None
    slow_at: int | None = None
    slow_s: float = 3.0

    def batch(self, step: int, part: int = 0) -> FakeBatch:
        if step == self.stuck_at:
            time.sleep(3600)
        if step == self.slow_at and part == 0:
            time.sleep(self.slow_s)
        share = self.global_batch // self.world
        rows = self.micro_batch or share
        first = step * self.global_batch + self.rank * share + part * rows
        positions = np.arange(first, first + rows)
        batch = _batch(positions % IMAGES, positions // IMAGES)
        if step in self.nan_steps and self.rank == 0 and part == 0:
            batch.latent[0, 0, 0, 0] = float("nan")
        return batch

    def samples(self, wanted) -> list[FakeBatch]:
        ids = np.array([int(key.removeprefix("image-")) for _, key in wanted])
        return [_batch(ids[:-1], 0 * ids[:-1]), _batch(ids[-1:], 0 * ids[-1:])]  # as of two buckets


@dataclass
class Notebook:
    """A watcher that keeps where attempts began, and warnings."""

    began_at: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def began(self, attempt: int, samples: int) -> None:
        self.began_at.append(samples)

    def progress(self, samples: int, note: str, loss: float | None) -> None:
        pass

    def preview(self, path: str) -> None:
        pass

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def _batch(ids: np.ndarray, epochs: np.ndarray) -> FakeBatch:
    images = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(int(i))) for i in ids])
    files = [StoredText.of(_features(int(i)), "float32").to_bytes("reference") for i in ids]
    text = StoredText.from_bytes(files, clip_tokens=TOKENS, t5_tokens=TOKENS)
    return FakeBatch(images, text, ids, epochs, [f"image-{i}" for i in ids])


def _features(image: int) -> TextFeatures:
    generator = torch.Generator().manual_seed(1000 + image)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    return TextFeatures(
        clip_l=draw(TOKENS, CLIP_WIDTH),
        clip_g=draw(TOKENS, CLIP_WIDTH),
        t5=draw(TOKENS, T5_WIDTH),
        clip_l_pooled=draw(CLIP_WIDTH),
        clip_g_pooled=draw(CLIP_WIDTH),
        lengths=torch.full((1, 3), TOKENS),
    )


def fake_loader(job: TrainingJob, rank: int, world: int, **changes) -> FakeLoader:
    """In the parts that the trainer of `job` takes."""
    return FakeLoader(job.training.global_batch, rank, world, job.training.micro_batch, **changes)


def make_training(**changes) -> Training:
    fields = {
        "side_px": 64,
        "samples": 96,
        "global_batch": 8,
        "micro_batch": 2,
        "checkpoint_every_samples": 32,
        "learning_rate": 1e-3,
        "warmup_samples": 16,
        "ema_every_steps": 2,
        "zero_stage": 2,
    }
    return Training(**fields | changes)


def make_job(store: Path, *, phase: str = "pretrain", model: MMDiTConfig = MODEL, **changes) -> TrainingJob:
    top = {key: changes.pop(key) for key in ("init", "seed", "log_dir", "previews") if key in changes}
    return TrainingJob(
        **{"seed": 7, "log_dir": str(store.parent / f"logs-{store.name}")} | top,
        store=str(store),
        run="test",
        phase=phase,
        spec="0123456789ab",
        fields={},
        model=model.to_dict(),
        training=make_training(**changes),
        text=Text(),
        latents=ManifestRef(folder="datasets/none/latents/0", digest="0" * 64),
        text_features=ManifestRef(folder="datasets/none/text/0", digest="0" * 64),
    )
