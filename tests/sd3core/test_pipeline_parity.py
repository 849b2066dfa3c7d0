"""A whole image, from noise to latent, against diffusers' pipeline with the same weights: within 1e-4 in fp32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from test_generate import FACTS, write_checkpoint

from sd3core.exchange.diffusers_folder import export_diffusers
from sd3core.generate import Generator
from sd3core.sample_settings import SampleSettings
from sd3core.towers.text_encoders import load_text_encoders

PROMPTS = ["a red square on the left", "", "a blue bar on the right and much more than the few tokens of these towers"]
SEEDS = [11, 7, 2**40]
SETTINGS = SampleSettings(32, 64, num_steps=7, guidance_scale=4.0, shift=FACTS.shift)  # not square
CLIP, T5 = FACTS.text.clip_tokens, FACTS.text.t5_tokens
WIDTH_L = 32  # CLIP-L's; its pooled vector is as wide


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def generator(checkpoint, towers_folder) -> Generator:
    return Generator.load(checkpoint, towers_folder)


@pytest.fixture(scope="module")
def pipeline(checkpoint, towers_folder, tmp_path_factory) -> StableDiffusion3Pipeline:
    folder = export_diffusers(checkpoint, towers_folder, tmp_path_factory.mktemp("exported") / "pipeline")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_null(generator: Generator, null: str) -> Generator:
    return Generator(generator.model, generator.encoders, generator.autoencoder, null)


def ours(generator: Generator, settings: SampleSettings) -> torch.Tensor:
    with torch.inference_mode():
        return generator.latents(PROMPTS, SEEDS, settings)


def theirs(pipeline: StableDiffusion3Pipeline, settings: SampleSettings, **arguments) -> torch.Tensor:
    arguments = {"prompt": PROMPTS, "max_sequence_length": T5} | arguments
    return pipeline(
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
        **arguments,
    ).images


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape == (3, 16, 4, 8)
    return (a - b).abs().max().item()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_pipelines_plain_call_is_guidance_away_from_the_encoded_empty_string(generator, pipeline, scale):
    settings = replace(SETTINGS, guidance_scale=scale)
    found = ours(with_null(generator, "empty"), settings)
    assert difference(found, theirs(pipeline, settings)) < 1e-4
    if scale != 1:
        assert difference(found, ours(generator, settings)) > 1e-2  # zeros are another "no prompt"
        assert difference(found, ours(generator, replace(settings, negative_prompt=""))) < 1e-4


def test_a_negative_prompt(generator, pipeline):
    settings = replace(SETTINGS, negative_prompt="a green bar")
    found = ours(generator, settings)
    assert difference(found, theirs(pipeline, settings, negative_prompt=["a green bar"] * 3)) < 1e-4
    assert difference(found, ours(generator, replace(settings, negative_prompt="a red square"))) > 1e-2


def test_without_t5(generator, pipeline, monkeypatch):
    """The pipeline puts zeros in its place, for the prompt and for the negative one."""
    settings = replace(SETTINGS, drop=("t5",), negative_prompt="")
    found = ours(generator, settings)
    assert difference(found, ours(generator, replace(settings, drop=()))) > 1e-2
    monkeypatch.setattr(pipeline, "text_encoder_3", None)
    assert difference(found, theirs(pipeline, settings)) < 1e-4


def test_zeros_for_no_prompt(generator, pipeline):
    nothing = {
        "negative_prompt_embeds": torch.zeros(3, CLIP + T5, 64),
        "negative_pooled_prompt_embeds": torch.zeros(3, 80),
    }
    assert difference(ours(generator, SETTINGS), theirs(pipeline, SETTINGS, **nothing)) < 1e-4


def encoded(pipeline: StableDiffusion3Pipeline, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, pooled) as the pipeline makes them."""
    with torch.no_grad():
        context, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=T5
        )
    return context, pooled


def given(context, pooled, negative, negative_pooled) -> dict[str, object]:
    """Arguments of the pipeline: embeddings instead of prompts."""
    prompt = {"prompt": None, "prompt_embeds": context, "pooled_prompt_embeds": pooled}
    return prompt | {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}


@pytest.mark.parametrize("drop", [("clip_l",), ("clip_g", "t5"), ("clip_l", "clip_g")])
def test_without_a_clip(generator, pipeline, drop):
    """The pipeline needs both CLIPs: it is given its own embeddings with zeros in the place of those left out."""
    context, pooled = encoded(pipeline, PROMPTS)
    if "clip_l" in drop:
        context[:, :CLIP, :WIDTH_L], pooled[:, :WIDTH_L] = 0, 0
    if "clip_g" in drop:
        context[:, :CLIP, WIDTH_L:], pooled[:, WIDTH_L:] = 0, 0
    if "t5" in drop:
        context[:, CLIP:] = 0
    arguments = given(context, pooled, torch.zeros_like(context), torch.zeros_like(pooled))
    settings = replace(SETTINGS, drop=drop)
    assert difference(ours(generator, settings), theirs(pipeline, settings, **arguments)) < 1e-4


def test_trimmed_padding(generator, pipeline, towers_folder):
    """Unknown to the pipeline: it is given its own embeddings with zeros after each tokenizer's real tokens."""

    def trimmed(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        context, pooled = encoded(pipeline, texts)
        for row, text in enumerate(texts):
            for tokenizer, first, count, channels in (
                (pipeline.tokenizer, 0, CLIP, slice(0, WIDTH_L)),
                (pipeline.tokenizer_2, 0, CLIP, slice(WIDTH_L, None)),
                (pipeline.tokenizer_3, CLIP, T5, slice(None)),
            ):
                real = min(count, len(tokenizer(text).input_ids))
                context[row, first + real : first + count, channels] = 0
        return context, pooled

    encoders = load_text_encoders(towers_folder, FACTS.text.model_copy(update={"padding": "trimmed"}))
    found = ours(Generator(generator.model, encoders, generator.autoencoder, "empty"), SETTINGS)
    arguments = given(*trimmed(PROMPTS), *trimmed([""] * len(PROMPTS)))
    assert difference(found, theirs(pipeline, SETTINGS, **arguments)) < 1e-4
    assert difference(found, ours(with_null(generator, "empty"), SETTINGS)) > 1e-2
