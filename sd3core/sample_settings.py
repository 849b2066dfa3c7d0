"""The settings of one drawing of pictures: also the sampler's part of a score's protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class SampleSettings:
    """Euler's method on rectified flow, from noise to a latent of this size."""

    height: int  # px
    width: int
    num_steps: int = 28
    guidance_scale: float = 5.0
    shift: float = 1.0
    drop: tuple[str, ...] = ()  # encoders left out, of clip_l, clip_g and t5
    convention: Literal["reference", "textbook"] = "reference"  # of rectified flow's steps; others have one

    def to_dict(self) -> dict[str, Any]:
        return {"sampler": "euler"} | asdict(self) | {"drop": sorted(self.drop)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SampleSettings:
        """Inverse of to_dict."""
        return cls(
            **{key: value for key, value in fields.items() if key != "sampler"} | {"drop": tuple(fields["drop"])}
        )
