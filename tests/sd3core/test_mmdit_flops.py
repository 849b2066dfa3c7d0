"""The FLOP count against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from small_models import SMALL_BACKBONES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sd3core.mmdit import MMDiT, MMDiTConfig, make_model
from sd3core.mmdit.flops import forward_flops


@pytest.mark.parametrize("name", SMALL_BACKBONES)
@pytest.mark.parametrize("depth", [1, 3])
def test_flops_are_those_that_torch_counts(name, depth):
    config = SMALL_BACKBONES[name](depth=depth)
    inputs = torch.randn(1, 16, 8, 12), torch.rand(1), torch.randn(1, 10, 48), torch.randn(1, 40)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):  # the others go uncounted on a CPU
            make_model(config)(*inputs)
    assert forward_flops(config, image_tokens=24, text_tokens=10) == counted.get_total_flops()


def test_flops_of_the_papers_model():
    config = MMDiTConfig.from_depth(24)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        MMDiT(config)(torch.empty(1, 16, 128, 128), torch.empty(1), torch.empty(1, 154, 4096), torch.empty(1, 2048))
    assert forward_flops(config, image_tokens=64**2, text_tokens=154) == counted.get_total_flops()
