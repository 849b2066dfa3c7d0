"""`auto`: bf16 where a device has arithmetic for it, else fp32, and the same run either way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd3core.precision import CPU, bf16_where_fast, has_bf16_arithmetic, resolve_precision
from sd3core.recipe import SmallVae
from sd3core.recipe_file import load_recipe
from sd3core.specs import train_fields
from sd3core.towers.training.vae import train_vae

AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}
PROCESSORS = [
    (AVX2, False),
    (AVX2 | {"avx512_f": True, "avx512_bw": True}, False),  # holds bf16, multiplies in fp32
    (AVX2 | {"avx512_f": True, "avx512_bf16": True}, True),
    (AVX2 | {"amx_bf16": True}, True),
    ({"architecture": "arm64", "neon": True, "fp16_arith": True}, False),
    ({"architecture": "arm64", "neon": True, "bf16": True}, True),
]


@pytest.fixture
def processor(monkeypatch):
    def pretend(capabilities) -> None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    return pretend


@pytest.mark.parametrize(("capabilities", "able"), PROCESSORS)
def test_products_take_the_format_that_the_processor_multiplies(processor, capabilities, able):
    processor(capabilities)
    assert has_bf16_arithmetic(CPU) is able
    with bf16_where_fast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if able else torch.float32)


def test_only_auto_depends_on_the_device():
    chosen = {
        (name, able): resolve_precision(name, bf16=able) for name in ("auto", "bf16", "fp32") for able in (False, True)
    }
    assert chosen == {
        ("auto", False): "fp32",
        ("auto", True): "bf16",
        ("bf16", False): "bf16",
        ("bf16", True): "bf16",
        ("fp32", False): "fp32",
        ("fp32", True): "fp32",
    }


def test_a_tower_learns_as_well_in_fp32(processor):
    """Both formats take a tower to the same place, so that runs of different processors can be compared."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (32, 1, 1, 3), dtype=np.uint8)
    images = [np.broadcast_to(colour, (64, 64, 3)).copy() for colour in colours]
    small = SmallVae(channels=(4, 8, 8, 8), crop_px=16, batch=4, steps=30)
    errors = {}
    for capabilities in (AVX2, AVX2 | {"avx512_bf16": True}):
        processor(capabilities)
        _, figures = train_vae(small, images, seed=0)
        errors[capabilities["avx512_bf16"]] = figures["psnr_16px_db"]
    assert errors[False] != errors[True]  # they did compute differently
    assert abs(errors[False] - errors[True]) < 1.0


def test_it_is_no_part_of_a_runs_identity():
    fields = {}
    for precision in ("auto", "bf16", "fp32"):
        recipe = load_recipe("tiny-test", [f"pretrain.precision={precision}"])
        fields[precision] = train_fields(recipe, recipe.pretrain, latents="l", text="t", init=None)
    assert fields["auto"] == fields["bf16"]  # what runs begun before there was `auto` have
    assert fields["auto"] != fields["fp32"]
