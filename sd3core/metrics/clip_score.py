"""CLIP score and CLIP features by the judging CLIP, which is none of the model's own encoders.

The paper's scale: the plain cosine (about 0.25 for good models with CLIP L/14), not torchmetrics' hundredfold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from sd3core.metrics.score import LeftOut, Score, too_few
from sd3core.text_encoders import load_model_folder, load_tokenizer

MIN_IMAGES = 8
# Means and deviations of the released CLIPs, for judges that come without a preprocessor_config.json.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Judge:
    """A CLIP with both sides. Features are projected and not normalised."""

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        vision: CLIPVisionModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.text, self.vision, self.tokenizer = text.eval(), vision.eval(), tokenizer
        self.side_px = vision.config.image_size
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))

    @property
    def dimensions(self) -> int:
        return self.vision.config.projection_dim

    @torch.no_grad()
    def image_features(self, images: np.ndarray, batch: int = 64) -> np.ndarray:
        """images (n, H, W, 3) uint8 -> (n, D) float32."""
        device = self.vision.device
        parts = [self.vision(self.preprocess(images[i : i + batch]).to(device)) for i in range(0, len(images), batch)]
        return torch.cat([part.image_embeds.float().cpu() for part in parts]).numpy()

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str], batch: int = 64) -> np.ndarray:
        """(n, D) float32; prompts longer than the judge's positions are cut."""
        limit = self.text.config.max_position_embeddings
        parts = []
        for i in range(0, len(prompts), batch):
            tokens = self.tokenizer(
                list(prompts[i : i + batch]), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
            )
            parts.append(self.text(tokens.input_ids.to(self.text.device)).text_embeds.float().cpu())
        return torch.cat(parts).numpy()

    def preprocess(self, images: np.ndarray) -> Tensor:
        """The shorter side to the judge's size (bicubic, antialiased), centre crop, its mean and deviation. -> (n, 3, s, s)."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255  # (n, 3, H, W)
        height, width = pixels.shape[-2:]
        scale = self.side_px / min(height, width)
        size = (max(self.side_px, round(height * scale)), max(self.side_px, round(width * scale)))
        if size != (height, width):
            pixels = interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - self.side_px) // 2, (size[1] - self.side_px) // 2
        return (pixels[..., top : top + self.side_px, left : left + self.side_px] - self.mean) / self.std


def load_judge(towers: Path, device: torch.device | str = "cpu") -> Judge:
    """The judge of a towers folder: judge_text, judge_vision, judge_tokenizer. Raises DataError where one is missing."""
    text = load_model_folder(CLIPTextModelWithProjection, towers / "judge_text", torch.float32).to(device)
    vision = load_model_folder(CLIPVisionModelWithProjection, towers / "judge_vision", torch.float32).to(device)
    preprocessing = towers / "judge_vision" / "preprocessor_config.json"
    fields = json.loads(preprocessing.read_text()) if preprocessing.is_file() else {}
    mean, std = fields.get("image_mean", CLIP_MEAN), fields.get("image_std", CLIP_STD)
    return Judge(text, vision, load_tokenizer(towers / "judge_tokenizer"), mean, std)


def cosines(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
    """(n, D) and (n, D) -> (n,) in [-1, 1]."""
    pair = (normalize(torch.from_numpy(f).double(), dim=-1) for f in (image_features, text_features))
    a, b = pair
    return (a * b).sum(dim=-1).numpy()


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> Score | LeftOut:
    """Mean cosine of each picture and its own prompt."""
    if len(image_features) < MIN_IMAGES:
        return too_few("CLIP score", len(image_features), MIN_IMAGES, "pictures")
    return Score(float(cosines(image_features, text_features).mean()), len(image_features))
