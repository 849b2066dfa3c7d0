from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from sd3core.costs import stages as module
from sd3core.costs.phases import phase_cost
from sd3core.costs.stages import GPU_BF16_TFLOPS, GPU_FP32_TFLOPS, stage_costs, training_flops
from sd3core.mmdit.flops import forward_flops
from sd3core.recipe_file import load_recipe
from sd3core.towers.flops import RELEASED


def costs_of(*overrides: str, name: str = "sd3-2b"):
    return {cost.name: cost for cost in stage_costs(load_recipe(name, list(overrides)))}


def test_activation_checkpointing_is_one_more_forward():
    recipe = load_recipe("sd3-2b")
    forward = forward_flops(recipe.model_config_for(recipe.pretrain), 256, 154)
    assert training_flops(recipe, recipe.pretrain) == 4 * forward
    plain = load_recipe("sd3-2b", ["pretrain.activation_checkpointing=false"])
    assert training_flops(plain, plain.pretrain) == 3 * forward
    assert costs_of()["pretrain"].flops == 2_048_000_000 * 4 * forward
    assert costs_of()["pretrain"].hours == pytest.approx(
        2_048_000_000 * 4 * forward / (64 * GPU_BF16_TFLOPS * 1e12 * 3600)
    )


def test_encoding_is_by_the_towers_at_each_phases_largest_bucket():
    costs = costs_of()
    assert costs["latents.pretrain"].flops == 1e6 * RELEASED.vae.encode_flops(256, 256)
    assert costs["text"].flops == 1e6 * 2 * RELEASED.text_flops(77, 77)  # original and synthetic captions
    assert costs["text"].hours == pytest.approx(costs["text"].flops / (64 * GPU_BF16_TFLOPS * 1e12 * 3600))
    in_fp32 = costs_of("encode.text_precision=fp32", "compute.encode.actors=8")
    assert in_fp32["text"].hours == pytest.approx(costs["text"].flops / (8 * GPU_FP32_TFLOPS * 1e12 * 3600))
    assert in_fp32["latents.pretrain"].hours == pytest.approx(8 * costs["latents.pretrain"].hours)
    assert in_fp32["evaluate"].hours == pytest.approx(costs["evaluate"].hours)
    alone = costs_of("caption.captioner=none")
    assert alone["text"].flops == costs["text"].flops / 2 and "caption" not in alone


def test_a_captioner_costs_by_its_parameters_and_is_not_guessed_where_it_is_not(tmp_path):
    assert costs_of()["caption"].hours is None
    save_file({"a": torch.zeros(1000, 1000), "b": torch.zeros(500)}, tmp_path / "model.safetensors")
    cost = costs_of(f"caption.model={tmp_path}", "caption.precision=fp32")["caption"]
    in_bf16 = costs_of(f"caption.model={tmp_path}")["caption"]
    parameters, images, batch = 1_000_500, 1e6, 8
    assert cost.flops == 2 * parameters * (1_000 + 64) * images
    seconds = cost.flops / (GPU_FP32_TFLOPS * 1e12) + 4 * parameters * 64 * images / batch / 2e12
    assert cost.hours == pytest.approx(seconds / 64 / 3600)
    seconds = cost.flops / (GPU_BF16_TFLOPS * 1e12) + 2 * parameters * 64 * images / batch / 2e12
    assert in_bf16.hours == pytest.approx(seconds / 64 / 3600)
    served = ["caption.captioner=endpoint", "caption.endpoint=http://a/v1", "caption.requests_in_flight=64"]
    cost = costs_of(*served)["caption"]
    assert (cost.hours, cost.work) == (None, "1,000,000 rows; at the rate of http://a/v1")


@pytest.mark.parametrize(
    "overrides, factor",
    [
        ([], 1),
        (["evaluate.weights=ema"], 1 / 2),
        (["evaluate.guidance_scale=1"], 1 / 2),
        (["evaluate.sampler=heun"], 99 / 50),
        (["evaluate.checkpoints=last"], 1 / 50),
    ],
)
def test_evaluation_draws_every_checkpoints_pictures(overrides, factor):
    only = ["finetune=[]", "evaluate.validation_images=0", "evaluate.compared_captions=0"]
    before, after = costs_of(*only)["evaluate"], costs_of(*only, *overrides)["evaluate"]
    pictures = 50 * 2 * (1000 + 16)
    assert before.work == f"{pictures:,} pictures"
    each = costs_of("finetune=[]", "evaluate.validation_images=0", "evaluate.compared_captions=3")["evaluate"]
    assert each.work == f"{pictures + 50 * 6:,} pictures"  # of one kind of weights
    recipe = load_recipe("sd3-2b")
    forward = forward_flops(recipe.model_config_for(recipe.pretrain), 256, 154)
    towers = pictures * (RELEASED.vae.decode_flops(256, 256) + RELEASED.judge.flops(257))
    assert before.flops == pytest.approx(pictures * 100 * forward + towers)
    drawn = factor if overrides and not overrides[0].startswith(("evaluate.guidance", "evaluate.sampler")) else 1
    assert after.flops - towers * drawn == pytest.approx(factor * pictures * 100 * forward)


def test_the_small_worlds_bench_is_drawn_at_all_sizes_in_turn(monkeypatch):
    monkeypatch.setattr(module, "matmul_flops_per_second", lambda *_: 1e12)
    recipe = load_recipe("mini")
    counts = module._pictures(recipe, recipe.finetune[0], last=True)
    bench = 6 * recipe.evaluate.bench_prompts_per_task * recipe.evaluate.bench_images_per_prompt
    evaluate = recipe.evaluate
    others = len(recipe.finetune[0].bucket_sides()) - 1
    assert (
        sum(counts.values())
        == bench + evaluate.scored_images + evaluate.grid_prompts + others * evaluate.bucket_grid_prompts
    )
    assert costs_of(name="mini")["evaluate"].hours > 0


def test_flipped_images_cost_the_autoencoder_and_the_store_twice_as_much_at_most():
    plain, flipped = (load_recipe("sd3-2b", more) for more in ([], ["encode.flip=true"]))
    one, two = (costs_of(*more)["latents.pretrain"] for more in ([], ["encode.flip=true"]))
    assert two.flops == 2 * one.flops and two.rows == one.rows
    sizes = [phase_cost(recipe, "pretrain", recipe.pretrain).latent_bytes for recipe in (plain, flipped)]
    assert sizes == [65_536, 131_072]
