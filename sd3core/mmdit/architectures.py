"""The backbones by the names that recipes and stored configs have for them."""

from __future__ import annotations

from functools import lru_cache

import torch

from sd3core.backbone_config import BackboneConfig
from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.model import MMDiT
from sd3core.mmdit.rivals import CrossDiT, DiT, UViT

BACKBONES: dict[str, type[Backbone]] = {"mmdit": MMDiT, "dit": DiT, "cross_dit": CrossDiT, "uvit": UViT}


def make_model(config: BackboneConfig) -> Backbone:
    """A fresh model of any architecture."""
    return BACKBONES[config.architecture](config)


@lru_cache
def count_parameters(config: BackboneConfig) -> int:
    """Trained parameters, counted on the real module without its memory (meta device)."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make_model(config).parameters())
