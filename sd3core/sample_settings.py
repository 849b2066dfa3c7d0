"""The settings of one drawing: also the sampler's part of a score's protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Sampler = Literal["euler", "heun", "dpm++2m", "dpm++2m-sde"]  # sampling.SAMPLERS
Weights = Literal["ema", "live"]  # of a training checkpoint
Convention = Literal["reference", "textbook"]  # of sampling.sigma_schedule


def best_schedule(sampler: Sampler) -> Convention:
    """The schedule where none is asked for: `reference`, as the released code; for both dpm++2m `textbook`, since they overshoot on the
    reference schedule's step to a last, tiny sigma.
    """
    return "textbook" if sampler.startswith("dpm++2m") else "reference"


@dataclass(frozen=True)
class SampleSettings:
    """How the way from noise to a latent of this size is gone."""

    height: int  # px
    width: int
    num_steps: int = 28  # of the sampler; heun calls the network twice a step, the others once
    guidance_scale: float = 5.0
    shift: float = 1.0
    drop: tuple[str, ...] = ()  # encoders left out, of clip_l, clip_g and t5
    convention: Convention | None = None  # of rectified flow's steps, others have one; None: the sampler's best
    sampler: Sampler = "euler"
    negative_prompt: str | None = None  # what guidance leads away from; None: "no prompt" as in training

    @property
    def schedule(self) -> Convention:
        return self.convention or best_schedule(self.sampler)

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Without a negative prompt it has no such key: so were scores made before there was one."""
        fields = asdict(self) | {"drop": sorted(self.drop), "convention": self.schedule}
        if self.negative_prompt is None:
            del fields["negative_prompt"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SampleSettings:
        """Inverse of to_dict."""
        return cls(**fields | {"drop": tuple(fields["drop"])})
