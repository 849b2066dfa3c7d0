"""Captions to features: CLIP-L, CLIP-G and T5 exactly as SD3 uses them.

Sequence of a CLIP: output of the second-to-last layer, without the final norm (hidden_states[-2]). Pooled: final-norm output at
the first end mark; CLIP-G's goes through its projection, CLIP-L's does not. Each tokenizer pads to the full length with its own
pad token; no attention mask reaches any encoder (a CLIP is causal). T5: the final hidden states.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
)
from transformers.utils import logging as transformers_logging

from sd3core.conditioning import ENCODERS, TextFeatures
from sd3core.errors import DataError
from sd3core.files.weight_files import TRANSFORMERS_STEM, find_weights
from sd3core.recipe import Text

# Folders of each encoder's model and tokenizer in a towers artifact, as diffusers' StableDiffusion3Pipeline names them.
TEXT_TOWER_FOLDERS = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}

WORD = re.compile(r"[^\W\d_]{2,}")
TOKEN_MARKS = re.compile("▁|</w>")  # of a word's beginning (T5) or end (CLIP)


class TextEncoders:
    """The three encoders with the recipe's token counts and padding.

    Several threads may ask at once: a call of a tokenizer first sets how it cuts and pads, for all of its callers.
    """

    def __init__(
        self, models: dict[str, PreTrainedModel], tokenizers: dict[str, PreTrainedTokenizerBase], text: Text
    ) -> None:
        self.models = {name: model.eval().requires_grad_(False) for name, model in models.items()}
        self.tokenizers = tokenizers
        self.tokenizing = Lock()
        self.text = text
        self.tokens = {"clip_l": text.clip_tokens, "clip_g": text.clip_tokens, "t5": text.t5_tokens}
        for name in ("clip_l", "clip_g"):
            positions = models[name].config.max_position_embeddings
            if text.clip_tokens > positions:
                raise DataError(f"text.clip_tokens {text.clip_tokens} is more than the {positions} positions of {name}")

    @property
    def widths(self) -> tuple[int, int]:
        """(context, pooled): the least context_dim that holds all sequences, and the length of the pooled vectors."""
        clip_l, clip_g, t5 = (self.models[name].config for name in ENCODERS)
        clip = clip_l.hidden_size + clip_g.hidden_size
        return max(clip, t5.d_model), clip_l.hidden_size + clip_g.projection_dim

    @torch.no_grad()
    def encode(self, captions: Sequence[str], drop: Collection[str] = ()) -> TextFeatures:
        """One row per caption, in order. Encoders named in `drop` are not run: their sequence and pooled vector are zeros."""
        unknown = set(drop) - set(ENCODERS)
        if unknown:
            raise ValueError(f"drop names {', '.join(sorted(unknown))}; the encoders are {', '.join(ENCODERS)}")
        parts: dict[str, Tensor] = {}
        lengths = []
        for name in ENCODERS:
            ids, length = self._tokenize(name, captions)
            lengths.append(length)
            parts |= self._absent(name, ids) if name in drop else self._run(name, ids)
        features = TextFeatures(**parts, lengths=torch.stack(lengths, dim=1))
        return features.trimmed() if self.text.padding == "trimmed" else features

    def unknown_words(self, prompts: Sequence[str], drop: Collection[str] = ()) -> list[str]:
        """Words that every encoder in use only spells, in pieces of less than two letters on average; each once, in order.

        Any text has tokens, so a word that no caption had is encoded too, and says nothing.
        """
        used = [self.tokenizers[name] for name in ENCODERS if name not in drop]
        words = dict.fromkeys(word for prompt in prompts for word in WORD.findall(prompt))
        return [word for word in words if used and all(_is_spelled(word, tokenizer) for tokenizer in used)]

    def too_long(self, prompts: Sequence[str], drop: Collection[str] = ()) -> list[str]:
        """Prompts whose end no encoder in use reads, since they have more tokens than each takes; each once, in order."""
        used = [name for name in ENCODERS if name not in drop]
        return [
            prompt for prompt in dict.fromkeys(prompts) if used and all(self._is_cut(name, prompt) for name in used)
        ]

    def _is_cut(self, name: str, prompt: str) -> bool:
        with self.tokenizing:
            ids = self.tokenizers[name](prompt, verbose=False).input_ids  # it would warn of a length that is not used
        return len(ids) > self.tokens[name]

    def null(self) -> TextFeatures:
        """The encoded empty string, a batch of one: what released pipelines use for "no prompt"."""
        return self.encode([""])

    def _tokenize(self, name: str, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (B, T) padded with the tokenizer's own pad id, and the count of real tokens (B,), marks included."""
        with self.tokenizing:
            encoded = self.tokenizers[name](
                list(captions), padding="max_length", max_length=self.tokens[name], truncation=True, return_tensors="pt"
            )
        return encoded.input_ids, encoded.attention_mask.sum(dim=1)

    def _run(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        model = self.models[name]
        ids = ids.to(model.device)
        if name == "t5":
            return {"t5": model(ids).last_hidden_state}
        states = model.text_model(ids, output_hidden_states=True)
        pooled = states.pooler_output  # (B, W), after the final norm, at the first end mark
        if name == "clip_g":
            pooled = model.text_projection(pooled)  # (B, P)
        return {name: states.hidden_states[-2], f"{name}_pooled": pooled}

    def _absent(self, name: str, ids: Tensor) -> dict[str, Tensor]:
        """Zeros in the shapes that _run gives."""
        model, (batch, tokens) = self.models[name], ids.shape
        zeros = {name: torch.zeros(batch, tokens, model.config.hidden_size, dtype=model.dtype, device=model.device)}
        if name != "t5":
            width = model.config.projection_dim if name == "clip_g" else model.config.hidden_size
            zeros[f"{name}_pooled"] = torch.zeros(batch, width, dtype=model.dtype, device=model.device)
        return zeros


def _is_spelled(word: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    tokens = tokenizer.tokenize(word)
    pieces = [piece for token in tokens if (piece := TOKEN_MARKS.sub("", token))]
    return tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(tokens) or len(word) < 2 * len(pieces)


def load_text_encoders(
    folder: Path | str,
    text: Text,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoders:
    """The three encoders of a towers folder, from safetensors, without the network.

    Raises DataError naming the folder that is missing or cannot be read.
    """
    folder = Path(folder)
    models, tokenizers = {}, {}
    for name, (model_folder, tokenizer_folder) in TEXT_TOWER_FOLDERS.items():
        model_class = T5EncoderModel if name == "t5" else CLIPTextModelWithProjection
        models[name] = load_model_folder(model_class, folder / model_folder, dtype).to(device)
        tokenizers[name] = load_tokenizer(folder / tokenizer_folder)
    return TextEncoders(models, tokenizers, text)


def load_model_folder(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model for inference. `dtype` is given at load so that T5 keeps its fp32 layers in half precision.

    Weights of another precision, as model.fp16.safetensors, are taken where they are the only ones.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: no config.json; this is what {model_class.__name__}.save_pretrained writes")
    weights = find_weights(folder, [TRANSFORMERS_STEM])
    try:
        with without_progress_bars():
            model, info = model_class.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                variant=weights and weights.variant or None,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{folder}: not a {model_class.__name__} in safetensors ({str(error).splitlines()[0]})"
        ) from None
    if info["missing_keys"]:
        raise DataError(
            f"{folder}: {len(info['missing_keys'])} weights of {model_class.__name__} are missing,"
            f" {min(info['missing_keys'])} among them; save the model again with that class"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own while it reads and writes weights; ours is the only progress a person sees."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise DataError(f"{folder}: missing; this is what a tokenizer's save_pretrained writes")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not a tokenizer ({str(error).splitlines()[0]})") from None
