"""A small CLIP: two towers trained to agree on captions and pictures.

Loss: the symmetric contrastive one, where pairs that carry the very same caption do not count against each other. Every caption
also gets a rival of its own in which two words of one kind have changed places ("a red circle and a blue square" against "a blue
circle and a red square"), because without it the features need not know which colour belongs to which shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, pad
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from sd3core.precision import bf16_where_fast
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.recipe import SmallClip
from sd3core.towers.judge import clip_pixels
from sd3core.towers.training.muon import Descent
from sd3core.towers.training.schedule import split_held_apart
from sd3core.towers.training.tokenizers import CLIP_POSITIONS

EMBEDDING_STD = 0.5  # transformers' 0.02 leaves the words themselves inaudible in the hidden states
LOGIT_SCALE_MAX = 100.0


def build_clip(small: SmallClip, tokenizer: CLIPTokenizer, *, identity_projection: bool, activation: str) -> CLIPModel:
    """An untrained CLIP. With identity_projection (CLIP-L in the SD3 layout) the pooled text vector itself is the feature."""
    projection = small.width if identity_projection else small.projection
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=small.width,
        intermediate_size=4 * small.width,
        projection_dim=projection,
        num_hidden_layers=small.layers,
        num_attention_heads=small.heads,
        max_position_embeddings=CLIP_POSITIONS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=small.width,
        intermediate_size=4 * small.width,
        projection_dim=projection,
        num_hidden_layers=small.layers,
        num_attention_heads=small.heads,
        image_size=small.image_px,
        patch_size=small.patch_px,
        hidden_act=activation,
    )
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection))
    embeddings = clip.text_model.embeddings
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=EMBEDDING_STD / 2)
    if identity_projection:
        torch.nn.init.eye_(clip.text_projection.weight)
        clip.text_projection.requires_grad_(False)
    return clip


def train_clip(
    small: SmallClip,
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    seed: int,
    report: ProgressCallback = ignore_progress,
) -> dict[str, float]:
    """Trains `clip` in place on pairs of uint8 (H, W, 3) pictures and captions; returns its figures.

    Accuracy: how often a picture's own caption (or one of the same words) scores highest among those of one batch held apart; and,
    against its rival alone, how often the caption wins (0.5 is chance).
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    pixels = clip_pixels(images, small.image_px)  # (N, 3, image_px, image_px)
    rivals = WordSwaps(captions)
    training, held = split_held_apart(len(captions), at_most=128)
    batch = min(small.batch, len(training))
    descent = Descent(clip, small.learning_rate, small.steps)
    meter = ProgressMeter(small.steps, "steps", report)
    clip.train()
    for step in range(small.steps):
        rows = generator.choice(training, batch, replace=False)
        chosen = [captions[row] for row in rows]
        logits, same = _logits(
            clip, tokenizer, _varied(pixels[rows], generator), chosen, [rivals.swap(c, generator) for c in chosen]
        )
        loss = contrastive_loss(logits, same)
        descent.step(loss)
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(LOGIT_SCALE_MAX)))
        if step % 20 == 19 or step == small.steps - 1:
            meter.update(step + 1, f"loss {loss.item():.2f}")
    clip.eval().requires_grad_(False)
    figures = {"steps": small.steps, "loss": round(loss.item(), 3)}
    figures |= _accuracy(clip, tokenizer, pixels[held], [captions[row] for row in held], rivals, generator)
    return figures | _equalise(clip, tokenizer, captions[: min(512, len(captions))])


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """-log of the right pair's share, over captions for each picture and over pictures for each caption, halved.

    logits (B, B + R): picture against caption, the right ones on the diagonal, R rivals after them. same (B, B + R) bool: equal in
    words to the right caption; these leave the sums (the diagonal stays).
    """
    size = len(logits)
    right = torch.arange(size, device=logits.device)
    hidden = same.clone()
    hidden[right, right] = False
    logits = logits.masked_fill(hidden, float("-inf"))
    return 0.5 * (cross_entropy(logits, right) + cross_entropy(logits[:, :size].T, right))


class WordSwaps:
    """Captions with two words of one kind exchanged; of one kind are words that follow mostly the same words in this data."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._before: dict[str, set[str]] = defaultdict(set)
        for caption in captions:
            words = caption.split()
            for before, word in zip(["", *words], words, strict=False):
                self._before[word].add(before)

    def swap(self, caption: str, generator: np.random.Generator) -> str:
        """The caption itself where it has no two such words."""
        words = caption.split()
        pairs = [(i, j) for i, j in combinations(range(len(words)), 2) if self._of_one_kind(words[i], words[j])]
        if not pairs:
            return caption
        i, j = pairs[generator.integers(len(pairs))]
        words[i], words[j] = words[j], words[i]
        return " ".join(words)

    def _of_one_kind(self, first: str, second: str) -> bool:
        if first == second:
            return False
        a, b = self._before[first], self._before[second]
        return len(a & b) >= 0.3 * len(a | b) > 0


def _varied(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Each picture shifted by up to an eighth of its side and its light changed a little; without it a small data set is learnt by
    heart. Not mirrored: captions say left and right."""
    side = pixels.shape[-1]
    reach = side // 8
    padded = pad(pixels, (reach,) * 4, mode="replicate")
    corners = generator.integers(2 * reach + 1, size=(len(pixels), 2))
    shifted = [
        image[:, top : top + side, left : left + side] for image, (top, left) in zip(padded, corners, strict=True)
    ]
    gain, offset = torch.from_numpy(generator.normal(0.0, 0.1, (2, len(pixels), 3, 1, 1))).float()
    return torch.stack(shifted) * (1.0 + gain) + offset


def _logits(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pixels: Tensor, captions: list[str], rivals: list[str]
) -> tuple[Tensor, Tensor]:
    """Scaled cosines (B, 2B) of pictures against captions and then rivals, and which of these say the same as the right one."""
    texts = captions + rivals
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with bf16_where_fast():
        image_features = clip.get_image_features(pixels).pooler_output
        text_features = clip.get_text_features(encoded.input_ids).pooler_output
    cosines = normalize(image_features.float(), dim=-1) @ normalize(text_features.float(), dim=-1).T
    same = torch.from_numpy(np.array(captions)[:, None] == np.array(texts)[None])
    return clip.logit_scale.exp() * cosines, same


@torch.no_grad()
def _accuracy(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    pixels: Tensor,
    captions: list[str],
    rivals: WordSwaps,
    generator: np.random.Generator,
) -> dict[str, float]:
    swapped = [rivals.swap(caption, generator) for caption in captions]
    logits, same = _logits(clip, tokenizer, pixels, captions, swapped)
    size = len(captions)
    best = logits[:, :size].argmax(dim=1)
    figures = {
        "held_apart": size,
        "retrieval_accuracy": round(same[torch.arange(size), best].float().mean().item(), 3),
    }
    real = torch.tensor([c != r for c, r in zip(captions, swapped, strict=True)])
    if real.any():
        wins = logits.diagonal() > logits[:, size:].diagonal()
        figures["word_order_accuracy"] = round(wins[real].float().mean().item(), 3)
    return figures


@torch.no_grad()
def _equalise(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> dict[str, float]:
    """Scales the text side so that penultimate states and pooled vectors have root mean square 1, without changing what it computes.

    Layers read the residual stream through a norm, so a common factor on everything written into it only scales the hidden states.
    A projected pooled vector is compared by its direction alone.
    """
    encoded = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
    real = encoded.attention_mask.bool()
    states = clip.text_model(encoded.input_ids, output_hidden_states=True)
    size = states.hidden_states[-2][real].square().mean().sqrt()
    embeddings = clip.text_model.embeddings
    for tensor in (embeddings.token_embedding.weight, embeddings.position_embedding.weight):
        tensor.div_(size)
    for layer in clip.text_model.encoder.layers:
        for tensor in (*layer.self_attn.out_proj.parameters(), *layer.mlp.fc2.parameters()):
            tensor.div_(size)
    identity = torch.equal(clip.text_projection.weight, torch.eye(*clip.text_projection.weight.shape))
    if not identity:
        clip.text_projection.weight.div_(clip.text_projection(states.pooler_output).square().mean().sqrt())
    pooled = clip.get_text_features(encoded.input_ids).pooler_output
    return {"hidden_rms_before": round(size.item(), 3), "pooled_rms": round(pooled.square().mean().sqrt().item(), 3)}
