"""The MM-DiT of Stable Diffusion 3, and the backbones it is compared with.

A diffusion transformer with separate weights for image and text.
"""

from sd3core.backbone_config import BackboneConfig, CrossDiTConfig, DiTConfig, MMDiTConfig, UViTConfig, config_from_dict
from sd3core.mmdit.architectures import count_parameters, make_model
from sd3core.mmdit.backbone import Backbone
from sd3core.mmdit.lean import use_lean_steps
from sd3core.mmdit.model import MMDiT
from sd3core.mmdit.qk_norm import insert_qk_norm, max_attention_logit
from sd3core.mmdit.rivals import CrossDiT, DiT, UViT

__all__ = [
    "Backbone",
    "BackboneConfig",
    "CrossDiT",
    "CrossDiTConfig",
    "DiT",
    "DiTConfig",
    "MMDiT",
    "MMDiTConfig",
    "UViT",
    "UViTConfig",
    "config_from_dict",
    "count_parameters",
    "insert_qk_norm",
    "make_model",
    "max_attention_logit",
    "use_lean_steps",
]
