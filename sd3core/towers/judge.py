"""The judging CLIP: features of pictures and prompts for CLIP score and FID. It conditions nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from sd3core.towers.text_encoders import load_model_folder, load_tokenizer

# CLIP's own colour statistics (OpenAI), which every released CLIP's preprocessor carries.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
JUDGE_FOLDERS = ("judge_text", "judge_vision", "judge_tokenizer")
BATCH = 64


class Judge:
    """Both sides of a CLIP. Features of pictures: `sd3core.metrics.clip_score.image_embeddings`."""

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        vision: CLIPVisionModelWithProjection,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.text = text
        self.vision = vision
        self.tokenizer = tokenizer

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """(B, P) float32 of unit length. The pooled vector is that of the first end mark, so padding does not touch it."""
        features = []
        positions = self.text.config.max_position_embeddings
        for start in range(0, len(captions), BATCH):
            part = list(captions[start : start + BATCH])
            encoded = self.tokenizer(part, padding=True, truncation=True, max_length=positions, return_tensors="pt")
            features.append(self.text(encoded.input_ids.to(self.text.device)).text_embeds.float())
        return normalize(torch.cat(features), dim=-1)


def load_judge(folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Judge:
    """The judge of a towers folder, from safetensors, without the network. Raises DataError naming what is missing."""
    text, vision, tokenizer = (Path(folder) / name for name in JUDGE_FOLDERS)
    return Judge(
        load_model_folder(CLIPTextModelWithProjection, text, dtype).to(device),
        load_model_folder(CLIPVisionModelWithProjection, vision, dtype).to(device),
        load_tokenizer(tokenizer),
    )


def clip_pixels(images: Sequence[np.ndarray] | np.ndarray, side: int) -> Tensor:
    """uint8 (H, W, 3) pictures -> (B, 3, side, side) as CLIP wants them: shorter side bicubic to `side`, middle, colours normalised."""
    squares = np.stack([_middle_square(np.asarray(image), side) for image in images])
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(PIXEL_STD).view(3, 1, 1)


def _middle_square(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    factor = side / min(height, width)
    size = max(side, round(width * factor)), max(side, round(height * factor))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - side) // 2, (resized.shape[1] - side) // 2
    return resized[top : top + side, left : left + side]
