"""Stands in for the models of the data stages: each counts what it is shown, and its answer follows from that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from in_process import without_ray
from PIL.Image import Image

import workers.shard_stage
from sd3core.captions.said import Said
from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.data.manifest import ManifestRef
from sd3core.towers.artifact import TOWER_FOLDERS

TOWERS = ManifestRef("towers", "0" * 64)
DIGESTS = dict.fromkeys(TOWER_FOLDERS, "0" * 64)


@dataclass
class Seen:
    """What the models were shown since the last look."""

    captioned: int = 0
    encoded: int = 0  # images, by all phases
    texts: list[str] = field(default_factory=list)
    before_encoding: Callable[[], None] = lambda: None  # called before each batch of images
    say: Callable[[tuple[int, ...]], Said] = lambda colour: Said(
        "shade {} {} {}".format(*colour)
    )  # of an image's corner

    def take(self) -> tuple[int, int, int]:
        """(images captioned, images encoded for each of two phases of other sizes, captions encoded)."""
        assert self.encoded % 2 == 0
        texts = [text for text in self.texts if text]  # the empty string stands apart
        taken = self.captioned, self.encoded // 2, len(texts)
        self.captioned = self.encoded = 0
        self.texts.clear()
        return taken


class CountingEncoders:
    tokens = dict.fromkeys(ENCODERS, 3)

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def encode(self, captions: list[str]) -> TextFeatures:
        self.seen.texts += captions
        lengths = torch.tensor([[min(len(caption.split()), 3)] * 3 for caption in captions])
        values = torch.tensor([float(sum(caption.encode()) % 997) for caption in captions])
        sequences = [values[:, None, None].expand(-1, 3, 4).clone() for _ in ENCODERS]
        return TextFeatures(*sequences, values[:, None].clone(), values[:, None].clone(), lengths)

    def too_long(self, captions: list[str]) -> list[str]:
        return [caption for caption in captions if len(caption.split()) > 3]


class CountingCaptioner:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def prepare(self, images: Sequence[Image]) -> Sequence[Image]:
        return images

    def write(self, images: Sequence[Image], seeds: Sequence[int]) -> list[Said]:
        self.seen.captioned += len(images)
        return [self.seen.say(tuple(map(int, np.asarray(image)[0, 0]))) for image in images]


class CountingAutoencoder:
    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.before_encoding()
        self.seen.encoded += len(images)
        mean = images.mean(dim=(1, 2, 3))
        return mean[:, None, None, None].expand(-1, 16, images.shape[2] // 8, images.shape[3] // 8)


def count_models(patch, folder: Path) -> Seen:
    """From here on captioning and encoding work in this process, with models that count. The towers are TOWERS."""
    seen = Seen()

    without_ray(patch, workers.shard_stage)
    patch.setenv("SD3_HOME", str(folder / "home"))
    patch.setattr("workers.encode.read_towers", lambda *_: SimpleNamespace(digests=DIGESTS))
    for module in ("encode_text", "encode_latents"):
        patch.setattr(f"workers.{module}.fetch_towers", lambda *_: folder)
    patch.setattr("sd3core.towers.text_encoders.load_text_encoders", lambda *_: CountingEncoders(seen))
    patch.setattr("sd3core.towers.autoencoder.load_autoencoder", lambda *_: CountingAutoencoder(seen))
    patch.setattr("workers.caption.load_captioner", lambda *_: CountingCaptioner(seen))
    patch.setattr("sd3core.specs.model_identity", lambda *_: "0" * 12)
    return seen
