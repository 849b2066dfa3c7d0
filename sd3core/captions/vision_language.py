"""A vision-language model as a captioner, from a local folder.

It takes any image-text-to-text model of transformers whose processor needs no package beyond the lock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    LogitsProcessor,
    LogitsProcessorList,
    ProcessorMixin,
)

from sd3core.captions.said import Said
from sd3core.errors import DataError
from sd3core.files.weight_files import TRANSFORMERS_STEM, find_weights

# How transformers says that something is not installed.
LACKING = re.compile(
    r"requires the (?P<library>\S+) library|need to have (?P<one>\w+) (?:or \w+ )?installed|No module named '(?P<module>[\w.]+)'"
)


class VisionLanguageCaptioner:
    """prepare(images) -> inputs on any thread; write(inputs, seeds) -> what the model said of each RGB image.

    By greedy decoding, or at a temperature by words drawn with each image's own seed: either way an image's words do not depend
    on those beside it, but for the last bits of their arithmetic. Loads from `folder` only (safetensors and the processor's
    files), never from the network, and runs none of its code. Raises DataError where the folder holds no such model.
    """

    def __init__(
        self,
        folder: Path | str,
        prompt: str,
        max_new_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        temperature: float = 0.0,
    ) -> None:
        folder = Path(folder)
        self.processor = load_processor(folder)
        self.asking = Lock()  # a tokenizer answers one thread at a time
        weights = find_weights(folder, [TRANSFORMERS_STEM])
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                variant=weights and weights.variant or None,
            )
        except (OSError, ValueError, ImportError) as error:
            raise _not_loaded(folder, error) from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.prompt = self._framed(prompt)
        if getattr(self.processor, "tokenizer", None) is not None:
            self.processor.tokenizer.padding_side = "left"  # generation goes on from the right end of every row

    def _framed(self, prompt: str) -> str:
        """The prompt as the model was trained to see it, with the place of the one image marked."""
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        image_token = getattr(self.processor, "image_token", None)
        return f"{image_token}\n{prompt}" if image_token else prompt

    def prepare(self, images: Sequence[Image]) -> BatchFeature:
        with self.asking:
            inputs = self.processor(
                images=[[image] for image in images],
                text=[self.prompt] * len(images),
                padding=True,
                return_tensors="pt",
            )
        inputs.pop("labels", None)  # some processors make them, for training
        return inputs

    @torch.no_grad()
    def write(self, inputs: BatchFeature, seeds: Sequence[int]) -> list[Said]:
        inputs = inputs.to(self.model.device, self.model.dtype)
        drawn = [DrawnWords(self.temperature, seeds, self.model.device)] if self.temperature else []
        generated = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            logits_processor=LogitsProcessorList(drawn),
        )
        start = self.model.generation_config.decoder_start_token_id
        new = _without_prompt(generated, inputs["input_ids"], start)  # (B, T)
        with self.asking:
            texts = self.processor.batch_decode(new, skip_special_tokens=True)
        lengths = [self._length(row) for row in new]
        return [
            Said(text, tokens, cut_off=not ended and tokens >= self.max_new_tokens)
            for text, (tokens, ended) in zip(texts, lengths, strict=True)
        ]

    def _length(self, tokens: Tensor) -> tuple[int, bool]:
        """(tokens that were written, whether the model ended them): what comes after the end is padding."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            return len(tokens), False
        found = torch.isin(tokens, torch.tensor(ends, device=tokens.device)).nonzero()
        return (int(found[0]), True) if len(found) else (len(tokens), False)


class DrawnWords(LogitsProcessor):
    """Makes the likeliest token a drawn one: argmax(logits / temperature + Gumbel noise) has the softmax's distribution.

    Each row has a generator of its own, so what is drawn for an image does not depend on the batch.
    """

    def __init__(self, temperature: float, seeds: Sequence[int], device: torch.device) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V) -> (B, V)
        rows = [
            torch.empty(scores.shape[1], device=scores.device).exponential_(generator=generator)
            for generator in self.generators
        ]
        least = torch.finfo(torch.float32).tiny  # else a draw of 0 would choose any token
        return scores.float() / self.temperature - torch.stack(rows).clamp(min=least).log()


def load_processor(folder: Path) -> ProcessorMixin:
    """What makes a model's inputs of images and words. Raises DataError where it needs a package that is not installed."""
    if not (folder / "config.json").is_file():
        raise DataError(f"caption.model {folder}: no config.json; give the local folder of a vision-language model")
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loaded(folder, error) from None


def _not_loaded(folder: Path, error: Exception) -> DataError:
    words = " ".join(str(error).split())
    if found := LACKING.search(words):
        package = next(filter(None, found.groups())).lower()
        return DataError(
            f"caption.model {folder}: it needs the package {package}, which this project's lock has not; install it where"
            " captions are made, take a model without it, or let a server run the model (caption.captioner=endpoint)"
        )
    if "trust_remote_code" in words or _names_code(folder):
        return DataError(
            f"caption.model {folder}: it brings code of its own, and that is never run here; take a model that transformers"
            " has, or let a server run it (caption.captioner=endpoint)"
        )
    return DataError(
        f"caption.model {folder}: not a vision-language model that transformers loads ({words[:300] or type(error).__name__})"
    )


def _names_code(folder: Path) -> bool:
    """Whether a config says that its classes are in files beside it."""
    return any('"auto_map"' in path.read_text(errors="replace") for path in folder.glob("*config.json"))


def _without_prompt(generated: Tensor, prompt: Tensor, start: int | None) -> Tensor:
    """Decoder-only models repeat the prompt's ids before the new ones; encoder-decoders begin with one of their own, `start`, which
    may be the one that ends a text.
    """
    length = prompt.shape[1]
    if generated.shape[1] >= length and torch.equal(generated[:, :length], prompt):
        return generated[:, length:]
    return generated[:, 1:] if start is not None and bool((generated[:, :1] == start).all()) else generated
