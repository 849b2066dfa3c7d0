"""Writes the README of an exported folder.

It shows the call of the diffusers pipeline that fits how this checkpoint was trained.
"""

from __future__ import annotations

from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.shown_text import markdown_code

README_HEAD = """\
# A Stable-Diffusion-3-class pipeline

Exported from {checkpoint}{samples}. Opens with diffusers' `StableDiffusion3Pipeline`.

- Trained around {side} x {side} px, resolution shift {shift:g} (set in the scheduler).
- {clip} CLIP tokens (set in the tokenizers) and {t5} T5 tokens: always pass `max_sequence_length={t5}`, the pipeline's
  default is another and there is no attention mask, so the length changes the picture.
- {null}

```python
import torch
from diffusers import StableDiffusion3Pipeline

folder, prompt = ".", "{prompt}"
pipe = StableDiffusion3Pipeline.from_pretrained(folder)
"""
NULL_WORDS = {
    "zeros": (
        "Without a prompt this model was given zeros, not the encoded empty string: pass zeros as the negative embeddings."
    ),
    "empty": (
        "Without a prompt this model was given the encoded empty string, which is what the pipeline makes of"
        ' `negative_prompt=""`.'
    ),
}
PROMPT = {
    "reference": "prompt=prompt, max_sequence_length={t5}",
    "trimmed": "prompt_embeds=embeds, pooled_prompt_embeds=pooled",
}
ZEROS = """\
negative = torch.zeros(1, {tokens}, {width}, dtype=pipe.transformer.dtype, device=pipe.transformer.device)
negative_pooled = torch.zeros(1, {pooled}, dtype=negative.dtype, device=negative.device)
"""
TRIMMED = '''\


def encode(text):
    """The features of a text with zeros after its real tokens: this model was trained on such."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        text, text, text, do_classifier_free_guidance=False, max_sequence_length={t5}
    )
    width_l, width_g = (e.config.hidden_size for e in (pipe.text_encoder, pipe.text_encoder_2))
    spans = (
        (pipe.tokenizer, 0, {clip}, slice(0, width_l)),
        (pipe.tokenizer_2, 0, {clip}, slice(width_l, width_l + width_g)),
        (pipe.tokenizer_3, {clip}, {t5}, slice(None)),
    )
    for tokenizer, first, count, channels in spans:
        real = len(tokenizer(text, truncation=True, max_length=count).input_ids)
        embeds[:, first + real : first + count, channels] = 0
    return embeds, pooled


embeds, pooled = encode(prompt)
'''
NEGATIVE = {
    "zeros": "negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled",
    "empty": 'negative_prompt=""',
    "empty trimmed": "negative_prompt_embeds=negative, negative_pooled_prompt_embeds=negative_pooled",
}
CALL = """\
image = pipe(
    {prompt_arguments},
    {negative_arguments},
    height={side},
    width={side},
    num_inference_steps=28,
    guidance_scale=5.0,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("picture.png")
```
"""


def readme(facts: CheckpointFacts, checkpoint: str, context_dim: int, pooled_dim: int) -> str:
    """Markdown with one Python block that runs as it stands inside the folder."""
    text, values = facts.text, {"t5": facts.text.t5_tokens, "clip": facts.text.clip_tokens, "side": facts.side_px}
    samples = f", {facts.samples:,} samples seen" if facts.samples is not None else ""
    example = "a photo of a red apple on a wooden table"
    parts = [
        README_HEAD.format(
            checkpoint=markdown_code(checkpoint),
            samples=samples,
            shift=facts.shift,
            null=NULL_WORDS[facts.null],
            prompt=example,
            **values,
        )
    ]
    negative = facts.null
    if text.padding == "trimmed":
        parts.append(TRIMMED.format(**values))
    if facts.null == "zeros":
        tokens = text.clip_tokens + text.t5_tokens
        parts.append(ZEROS.format(tokens=tokens, width=context_dim, pooled=pooled_dim))
    elif text.padding == "trimmed":
        parts.append('negative, negative_pooled = encode("")\n')
        negative = "empty trimmed"
    prompt_arguments = PROMPT[text.padding].format(**values)
    parts.append(CALL.format(prompt_arguments=prompt_arguments, negative_arguments=NEGATIVE[negative], **values))
    return "".join(parts)
