"""Every size of the paper's backbones: MM-DiT and its rivals. One rule for all: width 64 * depth, as many heads as blocks."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from sd3core.errors import CheckpointError

HEAD_WIDTH = 64
GROUP_CHANNELS = 16  # of one group of a group norm
MOST, MOST_BLOCKS = 2**20, 256  # of any size, and of blocks: a stored config may say anything
# Fields that came after the first checkpoints. At these values they are left out of a stored config, so that the
# fingerprints of older recipes and checkpoints stay.
ADDED_LATER = {"architecture": "mmdit", "dual_attention_blocks": 0}


@dataclass(frozen=True)
class BackboneConfig:
    """What all backbones have. `from_depth` is the paper's rule of sizes (section 4).

    Positions are counted in patches: a square grid of `position_base` patches has coordinates 0, 1, 2, ...; the model
    works around squares of `position_side` patches; `position_max` is the longest side of any grid.
    """

    architecture: ClassVar[str]

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int = 2
    latent_channels: int = 16
    context_dim: int = 4096
    pooled_dim: int = 2048
    qk_norm: str | None = None  # None or "rms"
    position_base: int = 16
    position_side: int = 64
    position_max: int = 192

    def __post_init__(self) -> None:
        # sizes; the annotations are strings, and 0 is allowed where it is the default
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.default == 0 else 1
            unset = field.type == "int | None" and value is None
            most = MOST_BLOCKS if field.name in ("depth", "conv_blocks") else MOST
            if field.type.startswith("int") and not unset and (type(value) is not int or not least <= value <= most):
                raise CheckpointError(
                    f"model config: {field.name} is {value!r}; it is a whole number from {least} to {most}"
                )
        if self.qk_norm not in (None, "rms"):
            raise CheckpointError(f"model config: qk_norm is {self.qk_norm!r}; it is null or 'rms'")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise CheckpointError(f"model config: hidden_size {self.hidden_size} is no multiple of 4 and of num_heads")

    @classmethod
    def from_depth(cls, depth: int, **overrides: Any) -> Self:
        """hidden_size = 64 * depth, num_heads = depth."""
        return cls.from_dict({"depth": depth, "hidden_size": HEAD_WIDTH * depth, "num_heads": depth} | overrides)

    @property
    def released_form(self) -> bool:
        """Whether diffusers and the released files have a form for it: the two-stream MM-DiT."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields and the architecture, less those of ADDED_LATER that are as they were before."""
        fields = {"architecture": self.architecture} | dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if (name, value) not in ADDED_LATER.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Strict inverse of `to_dict`. Raises CheckpointError that names an unknown or missing key."""
        fields = dict(fields)
        architecture = fields.pop("architecture", cls.architecture)
        if architecture != cls.architecture:
            raise CheckpointError(
                f"model config: architecture is {architecture!r}, {cls.architecture!r} is wanted here"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; valid here: {', '.join(known)}"
                raise CheckpointError(f"model config: unknown key {key!r}{hint}")
        for key in ("depth", "hidden_size", "num_heads"):
            if key not in fields:
                raise CheckpointError(f"model config: {key!r} is missing")
        return cls(**fields)


@dataclass(frozen=True)
class MMDiTConfig(BackboneConfig):
    """MM-DiT: a set of weights for each of two streams (text, image) or three (CLIP, T5, image)."""

    architecture: ClassVar[str] = "mmdit"

    clip_tokens: int | None = None  # where the context splits into CLIP and T5 for three streams; None: two streams
    dual_attention_blocks: int = 0  # the first n blocks give the image a second attention; SD3.5-medium: 13 of 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_attention_blocks > self.depth:
            raise CheckpointError(
                f"model config: dual_attention_blocks {self.dual_attention_blocks} is more than depth {self.depth}"
            )

    @property
    def streams(self) -> int:
        return 2 if self.clip_tokens is None else 3

    @property
    def released_form(self) -> bool:
        return self.streams == 2


@dataclass(frozen=True)
class DiTConfig(BackboneConfig):
    """DiT: one set of weights for text and image tokens."""

    architecture: ClassVar[str] = "dit"


@dataclass(frozen=True)
class CrossDiTConfig(BackboneConfig):
    """CrossDiT: image tokens only, text by cross-attention."""

    architecture: ClassVar[str] = "cross_dit"


@dataclass(frozen=True)
class UViTConfig(BackboneConfig):
    """UViT: convolutions at the latent's resolution around a transformer at the patches' resolution."""

    architecture: ClassVar[str] = "uvit"

    conv_blocks: int = 2  # residual blocks before the transformer, and as many after it

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % (4 * GROUP_CHANNELS):
            raise CheckpointError(
                f"model config: hidden_size {self.hidden_size} is no multiple of {4 * GROUP_CHANNELS}"
            )

    @property
    def conv_channels(self) -> int:
        """A quarter of the transformer's width: simple diffusion's step between its last two levels (4 to 16)."""
        return self.hidden_size // 4


CONFIGS: dict[str, type[BackboneConfig]] = {
    config.architecture: config for config in (MMDiTConfig, DiTConfig, CrossDiTConfig, UViTConfig)
}


def config_from_dict(fields: dict[str, Any]) -> BackboneConfig:
    """The inverse of every config's `to_dict`: without an architecture it is an MM-DiT.

    Raises CheckpointError that names an unknown architecture or key.
    """
    architecture = fields.get("architecture", "mmdit")
    if architecture not in CONFIGS:
        raise CheckpointError(f"model config: architecture {architecture!r} is not one of {', '.join(CONFIGS)}")
    return CONFIGS[architecture].from_dict(fields)
