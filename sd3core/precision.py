"""The number format of a forward pass, and what `precision: auto` means.

A processor without bf16 instructions emulates them: on one with AVX2 alone a training step takes 13 times as long in bf16
as in fp32, a small autoencoder's 15 times.
"""

from __future__ import annotations

from typing import Literal

import torch

from sd3core.recipe import Precision

PRECISION_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CPU = torch.device("cpu")
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # x86, x86, ARM


def has_bf16_arithmetic(device: torch.device) -> bool:
    """Whether the device has instructions for products in bf16, so that they are faster than in fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


def bf16_where_fast() -> torch.autocast:
    """Autocast of the CPU's products to bf16, where it has arithmetic for it; elsewhere they stay in fp32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bf16_arithmetic(CPU))


def resolve_precision(precision: Precision, bf16: bool) -> Literal["bf16", "fp32"]:
    """What to compute in, where there is arithmetic for bf16 or not."""
    if precision == "auto":
        return "bf16" if bf16 else "fp32"
    return precision
