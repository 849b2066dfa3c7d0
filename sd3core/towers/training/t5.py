"""A small T5, trained by span corruption on the captions; its encoder is kept.

Raffel et al. 2020, section 3.1.4.

Input: the caption with some spans each replaced by a sentinel. Target: each sentinel followed by what it replaced. As SD3 feeds
its T5, no attention mask is given and the caption is padded, here to a length that varies, so that no length is special.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

from sd3core.precision import bf16_where_fast
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.recipe import SmallT5
from sd3core.towers.training.muon import Descent
from sd3core.towers.training.schedule import split_held_apart

CORRUPTED = 0.3  # of the tokens; T5's 0.15 leaves captions of ten words with a single gap
SPAN_TOKENS = 2  # mean length of a gap
MAX_TOKENS = 128
MAX_EXTRA_PADDING = 16


def train_t5(
    small: SmallT5,
    tokenizer: T5Tokenizer,
    captions: Sequence[str],
    seed: int,
    report: ProgressCallback = ignore_progress,
) -> tuple[T5EncoderModel, dict[str, float]]:
    """(trained encoder, its figures: loss in nats a target token, on captions held apart)."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    model = _build(small, len(tokenizer))
    tokens = [tokenizer(caption, truncation=True, max_length=MAX_TOKENS).input_ids[:-1] for caption in captions]
    training, held = split_held_apart(len(captions), at_most=128)
    descent = Descent(model, small.learning_rate, small.steps)
    meter = ProgressMeter(small.steps, "steps", report)
    model.train()
    for step in range(small.steps):
        loss = _loss(model, tokenizer, [tokens[i] for i in generator.choice(training, small.batch)], generator)
        descent.step(loss)
        if step % 20 == 19 or step == small.steps - 1:
            meter.update(step + 1, f"loss {loss.item():.2f}")
    model.eval()
    with torch.no_grad():
        held_loss = _loss(model, tokenizer, [tokens[i] for i in held], generator)
    figures = {"steps": small.steps, "loss": round(loss.item(), 3), "held_apart_loss": round(held_loss.item(), 3)}
    encoder = _encoder_of(model)
    return encoder, figures | _equalise(encoder, tokenizer, captions[: min(256, len(captions))])


def corrupt(
    tokens: Sequence[int], sentinels: Sequence[int], end: int, generator: np.random.Generator
) -> tuple[list, list]:
    """(input, target) of one caption's tokens (without its end mark); at least one gap where there is a token.

    Gaps never touch, so each sentinel stands for one run of tokens.
    """
    if not tokens:
        return [end], [sentinels[0], end]
    gaps = max(1, round(CORRUPTED * len(tokens) / SPAN_TOKENS))
    gone = np.zeros(len(tokens), dtype=bool)
    for _ in range(gaps):
        length = int(generator.integers(1, 2 * SPAN_TOKENS))
        start = int(generator.integers(max(1, len(tokens) - length + 1)))
        gone[start : start + length] = True
    kept, target, sentinel = [], [], -1
    for position, token in enumerate(tokens):
        if not gone[position]:
            kept.append(token)
            continue
        if position == 0 or not gone[position - 1]:
            sentinel += 1
            kept.append(sentinels[sentinel])
            target.append(sentinels[sentinel])
        target.append(token)
    return [*kept, end], [*target, end]


def _build(small: SmallT5, vocabulary: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocabulary,
        d_model=small.width,
        d_kv=small.width // small.heads,
        d_ff=5 * small.width // 2,
        num_layers=small.layers,
        num_decoder_layers=1,
        num_heads=small.heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    # an untied head starts so loud that its loss is all there is to see
    model.lm_head.weight.data.mul_(small.width**-0.5)
    return model


def _loss(
    model: T5ForConditionalGeneration, tokenizer: T5Tokenizer, batch: list[list[int]], generator: np.random.Generator
) -> Tensor:
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    pairs = [corrupt(tokens, sentinels, tokenizer.eos_token_id, generator) for tokens in batch]
    longest = max(len(given) for given, _ in pairs) + int(generator.integers(MAX_EXTRA_PADDING + 1))
    inputs = _padded([given for given, _ in pairs], longest, tokenizer.pad_token_id)
    targets = _padded([wanted for _, wanted in pairs], max(len(wanted) for _, wanted in pairs), -100)
    with bf16_where_fast():
        return model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=targets).loss


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def _encoder_of(model: T5ForConditionalGeneration) -> T5EncoderModel:
    encoder = T5EncoderModel(model.config)
    weights = model.state_dict()
    shared = {"shared.weight": weights["shared.weight"], "encoder.embed_tokens.weight": weights["shared.weight"]}
    own = {key: value for key, value in weights.items() if key.startswith("encoder.")}
    encoder.load_state_dict(own | shared)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def _equalise(encoder: T5EncoderModel, tokenizer: T5Tokenizer, captions: Sequence[str]) -> dict[str, float]:
    """Scales the last norm so that the features of real tokens have root mean square 1: nothing else reads them any more."""
    encoded = tokenizer(list(captions), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    features = encoder(encoded.input_ids).last_hidden_state[encoded.attention_mask.bool()]
    size = features.square().mean().sqrt()
    encoder.encoder.final_layer_norm.weight.div_(size)
    return {"feature_rms_before": round(size.item(), 3)}
