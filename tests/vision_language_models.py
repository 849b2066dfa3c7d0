"""Vision-language models of random weights in folders: the classes are the released ones', the words mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def tokenizer_of(*special: str) -> PreTrainedTokenizerFast:
    """Of bytes; <pad> <s> </s> are 0 1 2, the special ones follow."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    marks = ["<pad>", "<s>", "</s>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(["a red circle"], trainers.BpeTrainer(special_tokens=marks, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
    )


def write_llava(folder: Path) -> None:
    tokenizer = tokenizer_of("<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    vision = CLIPVisionConfig(**SMALL, image_size=32, patch_size=16)
    text = LlamaConfig(**SMALL, **SPECIAL, vocab_size=len(tokenizer))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    _save(folder, lambda: LlavaForConditionalGeneration(config), processor)


def write_idefics3(folder: Path) -> None:
    """It cuts an image into tiles, so that images of other sizes have other lengths: batches of them are padded."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = tokenizer_of("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *tiles)
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    config = Idefics3Config(
        vision_config=SMALL | {"image_size": 32, "patch_size": 8},
        text_config=LlamaConfig(**SMALL, **SPECIAL, vocab_size=len(tokenizer)),
        image_token_id=3,
        scale_factor=2,
        pad_token_id=0,
    )
    _save(
        folder,
        lambda: Idefics3ForConditionalGeneration(config),
        Idefics3Processor(images, tokenizer, image_seq_len=4),
    )


def write_paligemma(folder: Path) -> None:
    """It sees image and prompt from both sides, and adds words of its own to the tokenizer."""
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    tokenizer = tokenizer_of("<image>")
    processor = PaliGemmaProcessor(images, tokenizer)
    text = GemmaConfig(**SMALL, **SPECIAL, num_key_value_heads=1, head_dim=8, vocab_size=len(tokenizer) + 8)
    vision = SiglipVisionConfig(**SMALL, image_size=32, patch_size=8, projection_dim=16)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=3, projection_dim=16, hidden_size=16
    )
    _save(folder, lambda: PaliGemmaForConditionalGeneration(config), processor)


def write_qwen2_vl(folder: Path) -> None:
    """No weights: its processor wants a package that the lock has not."""
    Qwen2VLImageProcessor().save_pretrained(folder)
    tokenizer_of("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>").save_pretrained(folder)
    Qwen2VLConfig().save_pretrained(folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "llava": write_llava,
    "idefics3": write_idefics3,
    "paligemma": write_paligemma,
}


def _save(folder: Path, make: Callable[[], torch.nn.Module], processor) -> None:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    processor.save_pretrained(folder)
