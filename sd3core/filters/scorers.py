"""Models of transformers that give an image a number, or a vector.

They come from local folders and never from the network. A scorer is any callable: images -> a number each. An embedder: images -> (n, D) float16, a row each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from sd3core.errors import DataError
from sd3core.recipe_filter import ScoreRule

Scorer = Callable[[Sequence[Image]], list[float]]
Embedder = Callable[[Sequence[Image]], np.ndarray]
HEAD = ("weight", "bias")


def load_scorer(name: str, score: ScoreRule, device: str = "cpu") -> Scorer:
    """The scorer that a recipe names. DataError with its key where the folder, the label or the head is not what it says."""
    key = f"filter.scores.{name}"
    if score.kind == "label":
        return _LabelScorer(score, key, device)
    return _HeadScorer(score, key, device)


def load_embedder(folder: str, batch: int, device: str = "cpu") -> Embedder:
    """Embeddings of a CLIP's image side, or of a vision model alone (DINO): its pooled vector, else its first token."""
    return _Embedder(folder, "filter.duplicates.model", batch, device)


class _LabelScorer:
    """The probability of a label of an image classifier."""

    def __init__(self, score: ScoreRule, key: str, device: str) -> None:
        self.pictures = _Pictures(AutoModelForImageClassification, score.model, f"{key}.model", score.batch, device)
        labels = {str(label): int(place) for place, label in self.pictures.model.config.id2label.items()}
        if score.label not in labels:
            raise DataError(f"{key}.label {score.label!r}: {score.model} has {', '.join(sorted(labels)[:20])}")
        self.place = labels[score.label]

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> list[float]:
        logits = torch.cat([self.pictures.model(**part).logits.float() for part in self.pictures.batches(images)])
        return logits.softmax(dim=1)[:, self.place].tolist()


class _HeadScorer:
    """A linear head on the normalised image embedding of a CLIP, as aesthetic predictors are."""

    def __init__(self, score: ScoreRule, key: str, device: str) -> None:
        self.embedder = _Embedder(score.model, f"{key}.model", score.batch, device)
        try:
            tensors = load_file(score.head)
            self.weight, self.bias = (tensors[name].float() for name in HEAD)
        except (OSError, SafetensorError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{key}.head {score.head}: wants weight (1, D) and bias (1,) ({reason})") from None
        width = self.embedder.width
        if self.weight.shape != (1, width) or self.bias.shape != (1,):
            shapes = f"{tuple(self.weight.shape)} and {tuple(self.bias.shape)}"
            raise DataError(
                f"{key}.head {score.head}: weight and bias are {shapes}; this CLIP wants (1, {width}) and (1,)"
            )

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image]) -> list[float]:
        return (self.embedder.vectors(images) @ self.weight.T + self.bias)[:, 0].tolist()


class _Embedder:
    def __init__(self, folder: str, key: str, batch: int, device: str) -> None:
        self.pictures = _Pictures(AutoModel, folder, key, batch, device)
        config = self.pictures.model.config
        self.is_clip = hasattr(self.pictures.model, "get_image_features")
        self.width = config.projection_dim if self.is_clip else config.hidden_size

    def __call__(self, images: Sequence[Image]) -> np.ndarray:
        return self.vectors(images).numpy().astype(np.float16)

    @torch.inference_mode()
    def vectors(self, images: Sequence[Image]) -> Tensor:
        """(n, D) float32 of unit length, on the CPU."""
        found = torch.cat([self._embed(part).float().cpu() for part in self.pictures.batches(images)])
        return torch.nn.functional.normalize(found, dim=1)

    def _embed(self, part: dict[str, Tensor]) -> Tensor:
        model = self.pictures.model
        if self.is_clip:
            found = model.get_image_features(**part)
            return found if isinstance(found, Tensor) else found.pooler_output
        found = model(**part)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled


class _Pictures:
    """A model with its image processor: images -> its inputs, a batch at a time, in fp32."""

    def __init__(self, kind: Any, folder: str, key: str, batch: int, device: str) -> None:
        self.batch, self.device = batch, device
        if not (Path(folder) / "config.json").is_file():
            raise DataError(f"{key} {folder}: no config.json there; give a model's folder on this machine")
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            model = kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"{key} {folder}: not a model of images that transformers loads ({reason})") from None
        self.model = model.to(device).eval().requires_grad_(False)

    def batches(self, images: Sequence[Image]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(images), self.batch):
            part = self.processor(images=list(images[start : start + self.batch]), return_tensors="pt")
            yield {"pixel_values": part["pixel_values"].to(self.device)}
