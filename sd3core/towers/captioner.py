"""A vision-language model as a captioner, from a local folder.

It takes any image-text-to-text model of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from sd3core.errors import DataError
from sd3core.files.weight_files import TRANSFORMERS_STEM, find_weights


class VisionLanguageCaptioner:
    """captions = captioner(images): one line of text per RGB image, by greedy decoding, so the same image gives the
    same words.

    Loads from `folder` only (safetensors and the processor's files), never from the network. Raises DataError where the
    folder holds no such model.
    """

    def __init__(
        self,
        folder: Path | str,
        prompt: str,
        max_new_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise DataError(f"caption.model {folder}: no config.json; give the local folder of a vision-language model")
        weights = find_weights(folder, [TRANSFORMERS_STEM])
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                variant=weights and weights.variant or None,
            )
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"caption.model {folder}: not a vision-language model that transformers loads ({reason})"
            ) from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.max_new_tokens = max_new_tokens
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

    @torch.no_grad()
    def __call__(self, images: Sequence[Image]) -> list[str]:
        inputs = self.processor(
            images=[[image] for image in images], text=[self.prompt] * len(images), padding=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)
        generated = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        new = _without_prompt(generated, inputs["input_ids"])  # (B, T)
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        cut_off = [row.shape[0] >= self.max_new_tokens and not self._ended(row) for row in new]
        return [_tidy(text, cut) for text, cut in zip(texts, cut_off, strict=True)]

    def _ended(self, tokens: Tensor) -> bool:
        ends = self.model.generation_config.eos_token_id
        return bool(torch.isin(tokens, torch.tensor(ends, device=tokens.device)).any()) if ends is not None else False


def _without_prompt(generated: Tensor, prompt: Tensor) -> Tensor:
    """Decoder-only models repeat the prompt's ids before the new ones; encoder-decoders do not."""
    length = prompt.shape[1]
    repeated = generated.shape[1] >= length and torch.equal(generated[:, :length], prompt)
    return generated[:, length:] if repeated else generated


def _tidy(text: str, cut_off: bool) -> str:
    """One line; a text that ran into the token limit ends at its last whole sentence, if it has one."""
    line = " ".join(text.split())
    if cut_off and ". " in line:
        return line[: line.rindex(". ") + 1]
    return line
