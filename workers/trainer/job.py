"""What a training phase is asked to do, and what it hands back.

Both are plain JSON values, which travel to any machine.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from sd3core.data.encoded_shards import Split
from sd3core.data.manifest import ManifestRef
from sd3core.errors import UserError
from sd3core.recipe import Text, Training
from sd3core.sample_settings import Sampler
from sd3core.specs import logs_folder, phase_folder, previews_folder


class TrainingFailed(UserError):
    """Training cannot go on; the message says where it stopped and why."""


class TrainingSuperseded(TrainingFailed):
    """A newer attempt of the same phase has begun: this one must not commit anything any more."""


class PreviewCaption(BaseModel):
    """A sample whose text features the shards hold, its caption for people, and whether the phase trains on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    shard: int  # number
    key: str
    caption: str
    split: Split = "held_out"


class PreviewSettings(BaseModel):
    """What is drawn while a phase trains. It changes nothing in training."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    captions: list[PreviewCaption]
    num_steps: int
    guidance_scale: float
    shift: float
    sampler: Sampler = "euler"


class TrainingJob(BaseModel):
    """One phase of one run. Equal jobs give equal checkpoints, whatever the number of ranks or restarts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    store: str  # URL
    run: str
    phase: str  # "pretrain", "finetune.0": also the recipe's key, for messages
    spec: str  # fingerprint of `fields`
    fields: dict[str, Any]
    model: dict[str, Any]  # BackboneConfig.to_dict()
    training: Training
    seed: int
    text: Text
    latents: ManifestRef
    text_features: ManifestRef
    init: str | None = None  # URL of a checkpoint, whose EMA weights are the start, or of a model folder
    recipe: dict[str, Any] | None = None  # kept with every checkpoint
    previews: PreviewSettings | None = None
    log_dir: str | None = None  # local folder for TensorBoard files; None: a temporary one

    @property
    def folder(self) -> str:
        return phase_folder(self.run, self.phase, self.spec)

    @property
    def logs_folder(self) -> str:
        return logs_folder(self.run, self.phase, self.spec)

    @property
    def previews_folder(self) -> str:
        return previews_folder(self.run, self.phase, self.spec)

    @property
    def total_steps(self) -> int:
        return self.training.total_steps

    @property
    def last_samples(self) -> int:
        """Where the phase ends. Its folder may hold later checkpoints, of a run that was longer."""
        return self.training.last_samples

    def samples_at(self, step: int) -> int:
        """Samples seen after `step` steps: the clock."""
        return step * self.training.global_batch

    def is_checkpoint_step(self, step: int) -> bool:
        """True for the first step at or past each multiple of checkpoint_every_samples, and for the last step."""
        every = self.training.checkpoint_every_samples
        return step == self.total_steps or self.samples_at(step) // every > self.samples_at(step - 1) // every


class TrainingResult(BaseModel):
    """A finished phase. `checkpoints`: finished folders in the store, oldest first."""

    checkpoints: list[str]
    samples: int
    resumed_from: int | None  # samples that stood finished when this call began
    attempts: int  # registered for this phase, over all calls
    warnings: list[str]
    metrics: list[str]  # paths of the checkpoints' loss rows; one after the other they are the phase's curve
