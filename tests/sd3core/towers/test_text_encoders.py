"""Our encoders against an independent implementation: diffusers' own pipeline, opened on an exported folder."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_towers import drawings

from sd3core.conditioning import join_features
from sd3core.errors import DataError
from sd3core.recipe import Text
from sd3core.towers.text_encoders import load_text_encoders
from sd3core.towers.training.tokenizers import make_clip_tokenizer, make_t5_tokenizer

PROMPTS = [
    "a red square on the left",
    "",
    "a GREEN bar! on the right, ünïcode 東京 and many more words than there are tokens " * 8,
]
TEXT = Text(clip_tokens=77, t5_tokens=24)


@pytest.fixture(scope="module")
def encoders(towers_folder: Path):
    return load_text_encoders(towers_folder, TEXT)


@pytest.fixture(scope="module")
def pipeline(towers_folder: Path, tmp_path_factory: pytest.TempPathFactory):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(towers_folder, folder, dirs_exist_ok=True)
    SD3Transformer2DModel(
        sample_size=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=16,
        pooled_projection_dim=80,
        pos_embed_max_size=8,
    ).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)


def encode_prompt(pipeline, t5_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, pooled) of PROMPTS as the pipeline makes them."""
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=t5_tokens
        )
    return context, pooled


@pytest.mark.parametrize("t5_tokens", [24, 77])
def test_equals_diffusers_encode_prompt(towers_folder: Path, pipeline, t5_tokens):
    encoders = load_text_encoders(towers_folder, Text(t5_tokens=t5_tokens))
    context, pooled = join_features(encoders.encode(PROMPTS), context_dim=64)
    theirs, their_pooled = encode_prompt(pipeline, t5_tokens)
    assert context.shape == theirs.shape == (3, 77 + t5_tokens, 64)
    assert torch.allclose(context, theirs, atol=1e-5) and torch.allclose(pooled, their_pooled, atol=1e-5)


def test_without_t5_equals_diffusers_encode_prompt(encoders, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "text_encoder_3", None)
    context, pooled = join_features(encoders.encode(PROMPTS, drop={"t5"}), context_dim=64)
    theirs, their_pooled = encode_prompt(pipeline, TEXT.t5_tokens)
    assert torch.allclose(context, theirs, atol=1e-5) and torch.allclose(pooled, their_pooled, atol=1e-5)
    assert not theirs[:, 77:].any() and theirs[:, :77].any()


def test_the_pipeline_draws_a_picture(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", height=64, width=64, num_inference_steps=1, output_type="pt").images
    assert image.shape == (1, 3, 64, 64) and torch.isfinite(image).all()


def test_pads_are_each_tokenizers_own(encoders):
    ids_l, lengths = encoders._tokenize("clip_l", ["a red square"])
    ids_g, _ = encoders._tokenize("clip_g", ["a red square"])
    ids_t5, t5_lengths = encoders._tokenize("t5", ["a red square"])
    end = encoders.tokenizers["clip_l"].eos_token_id
    assert lengths.tolist() == [5] and (ids_l[0, 4:] == end).all()
    assert ids_g[0, 4] == end and (ids_g[0, 5:] == 0).all()
    assert t5_lengths.tolist() == [4] and ids_t5[0, 3] == 1 and (ids_t5[0, 4:] == 0).all()


def test_clip_l_pooled_is_unprojected_even_where_the_folder_has_a_projection(towers_folder: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "towers"
    shutil.copytree(towers_folder, folder)
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"text_projection.weight": torch.randn(32, 32)}, weights, metadata={"format": "pt"})
    changed, plain = (load_text_encoders(f, TEXT).encode(["a red bar"]) for f in (folder, towers_folder))
    assert torch.equal(changed.clip_l_pooled, plain.clip_l_pooled)


def test_shorter_clip_tokens_give_the_beginning_of_the_longer(towers_folder: Path, encoders):
    short = load_text_encoders(towers_folder, Text(clip_tokens=16, t5_tokens=24)).encode(PROMPTS[:2])
    whole = encoders.encode(PROMPTS[:2])
    assert torch.allclose(short.clip_g, whole.clip_g[:, :16], atol=1e-5)
    assert torch.allclose(short.clip_g_pooled, whole.clip_g_pooled, atol=1e-5)
    assert torch.equal(short.lengths, whole.lengths)


def test_trimmed_padding_has_zeros_after_the_real_tokens(towers_folder: Path, encoders):
    trimmed = load_text_encoders(towers_folder, Text(clip_tokens=77, t5_tokens=24, padding="trimmed")).encode(PROMPTS)
    whole = encoders.encode(PROMPTS)
    assert torch.equal(trimmed.clip_l_pooled, whole.clip_l_pooled)
    assert torch.equal(trimmed.clip_g_pooled, whole.clip_g_pooled)
    for column, (name, limit) in enumerate((("clip_l", 77), ("clip_g", 77), ("t5", 24))):
        for row, prompt in enumerate(PROMPTS):
            real = min(limit, len(encoders.tokenizers[name](prompt).input_ids))  # marks included
            found, full = getattr(trimmed, name)[row], getattr(whole, name)[row]
            assert whole.lengths[row, column] == real
            assert torch.equal(found[:real], full[:real]) and not found[real:].any() and full[real:].all()


def test_dropped_encoders_are_zeros_of_the_same_shapes(encoders):
    whole, dropped = encoders.encode(PROMPTS[:1]), encoders.encode(PROMPTS[:1], drop={"clip_g", "t5"})
    assert torch.equal(dropped.clip_l, whole.clip_l)
    for name in ("clip_g", "clip_g_pooled", "t5"):
        assert getattr(dropped, name).shape == getattr(whole, name).shape and not getattr(dropped, name).any()
    with pytest.raises(ValueError, match="t6"):
        encoders.encode(["x"], drop={"t6"})


def test_null_is_the_encoded_empty_string(encoders):
    assert torch.allclose(encoders.null().t5[0], encoders.encode(PROMPTS[:2]).t5[1], atol=1e-6)


def test_words_that_no_caption_had_are_named(towers_folder: Path):
    own = load_text_encoders(towers_folder, TEXT)
    captions = drawings(64)[1]
    own.tokenizers = {
        "clip_l": make_clip_tokenizer(captions, 640, pad_with_id_0=False),
        "clip_g": make_clip_tokenizer(captions, 640, pad_with_id_0=True),
        "t5": make_t5_tokenizer(captions, 640),
    }
    assert own.unknown_words(captions) == []
    assert own.unknown_words(["a Red square!", "2 BAR"], drop=("t5",)) == []  # CLIP folds case, T5 does not
    prompts = ["a elephant on the left, a red bar", "the Elephant, 東京, the elephant"]
    assert own.unknown_words(prompts) == ["elephant", "Elephant", "東京"]
    own.tokenizers["t5"] = make_t5_tokenizer([*captions, "a elephant"], 640)
    assert own.unknown_words(prompts) == ["Elephant", "東京"]  # one encoder that knows a word is enough
    assert own.unknown_words(prompts, drop=("t5",)) == ["elephant", "Elephant", "東京"]
    assert own.unknown_words(prompts, drop=("clip_l", "clip_g", "t5")) == []


def test_a_prompt_is_too_long_when_no_encoder_in_use_reads_its_end(towers_folder: Path, recwarn):
    own = load_text_encoders(towers_folder, Text(clip_tokens=12, t5_tokens=10))
    prompts = ["a red square", "a red square " * 40, "a red square"]
    assert own.too_long(prompts) == [prompts[1]]
    longest = next(n for n in range(1, 40) if own.too_long(["red " * n])) - 1
    ids = [own.tokenizers[name]("red " * longest).input_ids for name in own.tokens]
    assert any(len(found) <= own.tokens[name] for found, name in zip(ids, own.tokens, strict=True))
    wide = load_text_encoders(towers_folder, Text(clip_tokens=12, t5_tokens=512))
    assert wide.too_long(prompts) == []  # T5 has read it
    assert wide.too_long(prompts, drop=("t5",)) == [prompts[1]]
    assert wide.too_long(prompts, drop=("clip_l", "clip_g", "t5")) == []


def test_a_wide_vocabulary_knows_words_it_never_saw_whole(towers_folder: Path):
    """As the released ones: longer words fall into pieces of several letters."""
    own = load_text_encoders(towers_folder, TEXT)
    parts = ["photographs of astronauts", "rainbow sunflower"] * 3
    for name in ("clip_l", "clip_g"):
        own.tokenizers[name] = make_clip_tokenizer(parts, 2000, pad_with_id_0=False)
    assert own.unknown_words(["photographer, astronautics; rainbows"], drop=("t5",)) == []


def test_a_missing_encoder_is_named(towers_folder: Path, tmp_path: Path):
    shutil.copytree(towers_folder, tmp_path / "t")
    shutil.rmtree(tmp_path / "t" / "text_encoder_3")
    with pytest.raises(DataError, match="text_encoder_3"):
        load_text_encoders(tmp_path / "t", TEXT)


def test_threads_that_ask_at_once_get_what_each_gets_alone(encoders):
    """An actor encodes one shard's captions while it looks for the cut ones of another's."""
    long = PROMPTS[-1]
    alone = encoders.encode([long])
    with ThreadPoolExecutor(2) as threads:
        looks = [threads.submit(encoders.too_long, [long]) for _ in range(300)]
        for _ in range(30):
            found = encoders.encode([long])
            assert all(torch.equal(getattr(found, name), getattr(alone, name)) for name in ("clip_l", "t5", "lengths"))
        assert all(look.result() == [long] for look in looks)
