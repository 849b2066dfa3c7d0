"""The MM-DiT of Stable Diffusion 3: a diffusion transformer with separate weights for image and text."""

from sd3core.mmdit.model import MMDiT, MMDiTConfig, insert_qk_norm, max_attention_logit

__all__ = ["MMDiT", "MMDiTConfig", "insert_qk_norm", "max_attention_logit"]
