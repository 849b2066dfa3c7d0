"""The image autoencoder: diffusers' AutoencoderKL with normalised latents.

The diffusion model sees latents so.

latent = (z - shift_factor) * scaling_factor with z the posterior's mean; f8, 16 channels (sd3: 1.5305 and 0.0609).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sd3core.buckets import DOWNSAMPLING
from sd3core.errors import DataError
from sd3core.files.weight_files import DIFFUSERS_STEM, find_weights


class Autoencoder:
    """Pictures to normalised latents and back. Deterministic: the posterior's mean, no draw."""

    def __init__(self, module: AutoencoderKL) -> None:
        self.module = module.eval().requires_grad_(False)
        self.shift = float(module.config.shift_factor)
        self.scale = float(module.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> latent (B, 16, H/8, W/8), mean 0 and std 1 over the data."""
        height, width = images.shape[-2:]
        if height % DOWNSAMPLING or width % DOWNSAMPLING:
            raise ValueError(f"images of {height}x{width} px: both sides must be multiples of {DOWNSAMPLING}")
        z = self.module.encode(images.to(self.module.device, self.module.dtype)).latent_dist.mode()
        return (z.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """latent (B, 16, h, w) -> images (B, 3, 8h, 8w), clamped to [-1, 1]."""
        z = latent.to(self.module.device, self.module.dtype) / self.scale + self.shift
        return self.module.decode(z).sample.clamp(-1.0, 1.0)


def load_autoencoder(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The VAE of a towers folder (or a folder that is itself a VAE), from safetensors, without the network.

    Raises DataError where the folder holds no f8 AutoencoderKL with a shift and a scale.
    """
    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    check_vae_config(folder)
    weights = find_weights(folder, [DIFFUSERS_STEM])
    try:
        module = AutoencoderKL.from_pretrained(
            folder,
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            variant=weights and weights.variant or None,
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: not a diffusers AutoencoderKL in safetensors ({str(error).splitlines()[0]})"
        ) from None
    return Autoencoder(module.to(device))


def check_vae_config(folder: Path) -> None:
    """Raises DataError where config.json does not describe an autoencoder this system can use."""
    path = folder / "config.json"
    if not path.is_file():
        raise DataError(f"{path}: missing; a VAE folder is what AutoencoderKL.save_pretrained writes")
    config = json.loads(path.read_text())
    levels = len(config.get("block_out_channels", ()))
    if 2 ** (levels - 1) != DOWNSAMPLING:
        raise DataError(f"{path}: block_out_channels has {levels} levels; the latents need 4 (f8)")
    for key in ("scaling_factor", "shift_factor"):
        if config.get(key) is None:
            raise DataError(f"{path}: {key} is missing; latents cannot be normalised without it")
