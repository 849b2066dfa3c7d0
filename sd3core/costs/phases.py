"""What a training phase costs in memory, storage and FLOPs.

It is told from the recipe's numbers alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sd3core.conditioning import ENCODERS
from sd3core.costs.stages import training_flops
from sd3core.data.stored_text import caption_bytes
from sd3core.mmdit import count_parameters
from sd3core.mmdit.flops import forward_flops
from sd3core.recipe import Recipe, Training

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
RELEASED_WIDTHS = {"clip_l": 768, "clip_g": 1280, "clip_g_pooled": 1280, "t5": 4096}


@dataclass(frozen=True)
class PhaseCost:
    """One training phase in numbers."""

    key: str
    parameters: int
    steps: int
    samples: int
    tokens: int  # image and text, of one sample
    step_flops: float  # of the whole global batch: forward, backward, and what is computed again
    latent_bytes: int  # of one sample, with the flipped image's
    checkpoint_bytes: int
    checkpoints: int
    rank_state_bytes: dict[int, float]  # ZeRO stage -> weights, gradients, fp32 master, both moments, EMA of one rank

    @property
    def flops(self) -> float:
        return self.step_flops * self.steps


def zero_bytes(parameters: int, stage: int, ranks: int, precision: str) -> float:
    """Bytes of one rank's training state. bf16 (and auto): weights 2, gradients 2, master 4, moments 8, EMA 4; fp32 has no master of its own.

    ZeRO 1 shards the optimizer and the EMA, 2 the gradients as well, 3 the weights as well (Rajbhandari et al. 2020).
    """
    weights, gradients, optimizer = (2, 2, 16) if precision != "fp32" else (4, 4, 12)
    return parameters * (
        weights / (ranks if stage >= 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


def phase_cost(recipe: Recipe, key: str, phase: Training) -> PhaseCost:
    config = recipe.model_config_for(phase)
    parameters = count_parameters(config)
    sides = phase.bucket_sides()
    pixels = max(height * width for height, width in sides)
    image_tokens = pixels // 256
    text_tokens = recipe.text.clip_tokens + recipe.text.t5_tokens
    return PhaseCost(
        key=key,
        parameters=parameters,
        steps=phase.total_steps,
        samples=phase.samples,
        tokens=image_tokens + text_tokens,
        step_flops=phase.global_batch * training_flops(recipe, phase),
        latent_bytes=(2 if recipe.encode.flip else 1)
        * pixels
        // 64
        * config.latent_channels
        * BYTES[recipe.encode.latent_dtype],
        checkpoint_bytes=parameters * 16,  # fp32 weights, two moments, EMA
        checkpoints=math.ceil(phase.samples / phase.checkpoint_every_samples),
        rank_state_bytes={
            stage: zero_bytes(parameters, stage, recipe.compute.train_ranks, phase.precision) for stage in range(4)
        },
    )


def text_bytes(recipe: Recipe) -> int:
    """Stored features of one caption at full length; with text.padding "trimmed" that is the most they take."""
    small, text = recipe.towers.small, recipe.text
    if small is None:
        widths, projection = (RELEASED_WIDTHS[name] for name in ENCODERS), RELEASED_WIDTHS["clip_g_pooled"]
    else:
        widths, projection = (small.clip_l.width, small.clip_g.width, small.t5.width), small.clip_g.projection
    clip_l, clip_g, t5 = widths
    tokens = (text.clip_tokens, text.clip_tokens, text.t5_tokens)
    return caption_bytes(tokens, (clip_l, clip_g, t5), clip_l + projection, recipe.encode.text_dtype)


@dataclass(frozen=True)
class BackboneCost:
    """One of the paper's backbones at a recipe's depth and width."""

    name: str
    parameters: int
    flops: float  # of a forward pass of one sample


def compare_backbones(recipe: Recipe, phase: Training) -> list[BackboneCost]:
    """Figure 4's backbones under one recipe: equal depth and width, so unequal parameters and FLOPs."""
    image_tokens, text_tokens = phase.side_px**2 // 256, recipe.text.clip_tokens + recipe.text.t5_tokens
    plans = []
    for architecture, streams in (("mmdit", 2), ("mmdit", 3), ("dit", 2), ("cross_dit", 2), ("uvit", 2)):
        plain = {"architecture": architecture, "streams": streams, "dual_attention_blocks": 0}
        config = recipe.model_copy(update={"model": recipe.model.model_copy(update=plain)}).model_config_for(phase)
        name = f"{architecture}, {streams} streams" if architecture == "mmdit" else architecture
        plans.append(BackboneCost(name, count_parameters(config), forward_flops(config, image_tokens, text_tokens)))
    return plans
