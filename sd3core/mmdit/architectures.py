"""The backbones by the names that recipes and stored configs have for them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from sd3core.errors import CheckpointError
from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.config import BackboneConfig, CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig
from sd3core.mmdit.model import MMDiT
from sd3core.mmdit.rivals import CrossDiT, DiT, UViT

CONFIGS: dict[str, type[BackboneConfig]] = {
    config.architecture: config for config in (MMDiTConfig, DiTConfig, CrossDiTConfig, UViTConfig)
}
BACKBONES: dict[str, type[Backbone]] = {"mmdit": MMDiT, "dit": DiT, "cross_dit": CrossDiT, "uvit": UViT}


def make_model(config: BackboneConfig) -> Backbone:
    """A fresh model of any architecture."""
    return BACKBONES[config.architecture](config)


@lru_cache
def count_parameters(config: BackboneConfig) -> int:
    """Trained parameters, counted on the real module without its memory (meta device)."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config).parameters())


def config_from_dict(fields: dict[str, Any]) -> BackboneConfig:
    """The inverse of every config's `to_dict`: without an architecture it is an MM-DiT.

    Raises CheckpointError that names an unknown architecture or key.
    """
    architecture = fields.get("architecture", "mmdit")
    if architecture not in CONFIGS:
        raise CheckpointError(f"model config: architecture {architecture!r} is not one of {', '.join(CONFIGS)}")
    return CONFIGS[architecture].from_dict(fields)
