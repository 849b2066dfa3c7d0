"""Makes a small tower from a data set's own pictures and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from transformers.modeling_utils import PreTrainedModel

from sd3core.errors import DataError
from sd3core.progress import ProgressCallback, ignore_progress
from sd3core.recipe import SmallTowers
from sd3core.towers.artifact import TOWER_FOLDERS
from sd3core.towers.text_encoders import without_progress_bars
from sd3core.towers.training.clip import build_clip, train_clip
from sd3core.towers.training.t5 import train_t5
from sd3core.towers.training.tokenizers import make_clip_tokenizer, make_t5_tokenizer
from sd3core.towers.training.vae import train_vae


def make_small_tower(
    name: str,
    small: SmallTowers,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    seed: int,
    out: Path,
    report: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Trains one tower into its folders under `out` (TOWER_FOLDERS) and returns its figures. A function of its arguments."""
    if not images:
        raise DataError("towers.small: the data set has no picture to train on")
    with torch.random.fork_rng(devices=[]), without_progress_bars():
        if name == "vae":
            vae, figures = train_vae(small.vae, images, 1000 * seed, report)
            vae.save_pretrained(out / "vae")
            return figures
        described = [row for row, caption in enumerate(captions) if caption.strip()]
        if not described:
            raise DataError(
                "towers.small: the pictures have no captions to learn words from; give captions, or released towers"
            )
        texts = [captions[row] for row in described]
        if name == "t5":
            return _make_t5(small, texts, seed, out, report)
        return _make_clip(name, small, [images[row] for row in described], texts, seed, out, report)


def _make_clip(
    name: str,
    small: SmallTowers,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    seed: int,
    out: Path,
    report: ProgressCallback,
) -> dict[str, Any]:
    settings = {"clip_l": small.clip_l, "clip_g": small.clip_g, "judge": small.judge}[name]
    own_seed = 1000 * seed + settings.seed
    torch.manual_seed(own_seed)
    tokenizer = make_clip_tokenizer(captions, small.vocabulary, pad_with_id_0=name == "clip_g")
    activation = "gelu" if name == "clip_g" else "quick_gelu"
    clip = build_clip(settings, tokenizer, identity_projection=name == "clip_l", activation=activation)
    figures = train_clip(settings, clip, tokenizer, images, captions, own_seed, report)
    if name == "judge":
        text_folder, vision_folder, tokenizer_folder = TOWER_FOLDERS[name]
        vision = _side(CLIPVisionModelWithProjection(clip.config.vision_config), clip)
        vision.save_pretrained(out / vision_folder)
    else:
        text_folder, tokenizer_folder = TOWER_FOLDERS[name]
    _side(CLIPTextModelWithProjection(clip.config.text_config), clip).save_pretrained(out / text_folder)
    tokenizer.save_pretrained(out / tokenizer_folder)
    return figures


def _make_t5(
    small: SmallTowers, captions: Sequence[str], seed: int, out: Path, report: ProgressCallback
) -> dict[str, Any]:
    tokenizer = make_t5_tokenizer(captions, small.vocabulary)
    encoder, figures = train_t5(small.t5, tokenizer, captions, 1000 * seed + small.t5.seed, report)
    model_folder, tokenizer_folder = TOWER_FOLDERS["t5"]
    encoder.save_pretrained(out / model_folder)
    tokenizer.save_pretrained(out / tokenizer_folder)
    return figures


def _side(side: PreTrainedModel, clip: PreTrainedModel) -> PreTrainedModel:
    """One side of a CLIP as a model of its own, with the trained weights."""
    weights = clip.state_dict()
    side.load_state_dict({key: weights[key] for key in side.state_dict()})
    return side.eval()
