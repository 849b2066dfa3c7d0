"""A small f8 16-channel autoencoder, trained on a data set's own pictures.

Loss: mean |x - x'| + mean (x - x')^2 + kl_weight * KL per latent number. The pictures are seen at two scales (shorter side one
and two crops), as pretraining and fine-tuning will encode them. The draw from the posterior is what makes the decoder forgive
the small errors of a diffusion model, and the KL what keeps the latents near a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from sd3core.precision import bf16_where_fast
from sd3core.progress import ProgressCallback, ProgressMeter, ignore_progress
from sd3core.recipe import SmallVae
from sd3core.towers.training.muon import Descent
from sd3core.towers.training.schedule import split_held_apart

LATENT_CHANNELS = 16
START_LOG_VARIANCE = -5.0
SCALES = (1, 2)  # shorter sides seen in training, in crops


def build_vae(small: SmallVae) -> AutoencoderKL:
    """An untrained AutoencoderKL; shift and scale are written by normalise_latents."""
    levels = len(small.channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(small.channels),
        layers_per_block=small.layers_per_block,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=min(32, max(1, math.gcd(*small.channels) // 4)),
        sample_size=small.crop_px,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )
    _quick_start(vae)
    return vae


@torch.no_grad()
def _quick_start(vae: AutoencoderKL) -> None:
    """Starts the network near a linear map, from which it learns several times faster than from the default initialisation.

    Residual branches (ResNet and attention) start at zero; the convolutions that lie outside them keep the variance; the
    posterior starts quiet (its default std of 1 is far louder than its mean, so nothing would pass).
    """
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Conv2d) and not name.endswith(".conv1"):
            fan_in = module.weight[0].numel()
            torch.nn.init.normal_(module.weight, std=fan_in**-0.5)
            torch.nn.init.zeros_(module.bias)
    log_variance = slice(LATENT_CHANNELS, 2 * LATENT_CHANNELS)
    vae.encoder.conv_out.weight[log_variance] = 0.0
    vae.encoder.conv_out.bias[log_variance] = START_LOG_VARIANCE


def train_vae(
    small: SmallVae, images: Sequence[np.ndarray], seed: int, report: ProgressCallback = ignore_progress
) -> tuple[AutoencoderKL, dict[str, float]]:
    """uint8 (H, W, 3) pictures of any sizes -> (trained VAE with its shift and scale, its figures)."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    vae = build_vae(small).train()
    training, held = split_held_apart(len(images))
    pyramids = [[_resize(images[i], scale * small.crop_px) for scale in SCALES] for i in range(len(images))]
    descent = Descent(vae, small.learning_rate, small.steps)
    meter = ProgressMeter(small.steps, "steps", report)
    for step in range(small.steps):
        batch = _crops(pyramids, generator.choice(training, small.batch), small.crop_px, generator)
        loss, error = _loss(vae, batch, small.kl_weight)
        descent.step(loss)
        if step % 20 == 19 or step == small.steps - 1:
            meter.update(step + 1, f"PSNR {_psnr(error.item()):.1f} dB")
    vae.eval().requires_grad_(False)
    figures = {"steps": small.steps}
    for position, scale in enumerate(SCALES):
        squares = _middles([pyramids[i][position] for i in held], scale * small.crop_px)
        figures[f"psnr_{scale * small.crop_px}px_db"] = round(_psnr(_reconstruction_error(vae, squares)), 2)
    return vae, figures | normalise_latents(vae, _middles([pyramids[i][0] for i in training[:512]], small.crop_px))


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, images: Tensor) -> dict[str, float]:
    """Writes shift and scale to the config so that (z - shift) * scale has mean 0 and std 1 over `images` (B, 3, H, W)."""
    z = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(32)])  # (B, 16, h, w)
    shift, scale = z.mean().item(), 1.0 / max(z.std().item(), 1e-6)
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    channels = ((z - shift) * scale).std(dim=(0, 2, 3))
    return {
        "latent_shift": shift,
        "latent_scale": scale,
        "latent_channel_std_min": round(channels.min().item(), 3),
        "latent_channel_std_max": round(channels.max().item(), 3),
    }


def _loss(vae: AutoencoderKL, batch: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    with bf16_where_fast():
        posterior = vae.encode(batch).latent_dist
        images = vae.decode(posterior.sample()).sample
    difference = images.float() - batch
    error = difference.square().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return difference.abs().mean() + error + kl_weight * kl, error.detach()


@torch.no_grad()
def _reconstruction_error(vae: AutoencoderKL, images: Tensor) -> float:
    errors = []
    for part in images.split(16):
        decoded = vae.decode(vae.encode(part).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - part).square().mean(dim=(1, 2, 3)))
    return torch.cat(errors).mean().item()


def _psnr(error: float) -> float:
    """Mean squared error in [-1, 1] -> dB; the range is 2 wide."""
    return 10.0 * math.log10(4.0 / max(error, 1e-12))


def _resize(image: np.ndarray, shorter_px: int) -> np.ndarray:
    """Shorter side `shorter_px`, proportions kept."""
    height, width = image.shape[:2]
    factor = shorter_px / min(height, width)
    size = max(shorter_px, round(width * factor)), max(shorter_px, round(height * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _crops(pyramids: list[list[np.ndarray]], rows: np.ndarray, side: int, generator: np.random.Generator) -> Tensor:
    """A square of `side` px from a random place and scale of each picture, mirrored half the time: (B, 3, side, side)."""
    crops = []
    for row in rows:
        image = pyramids[row][generator.integers(len(SCALES))]
        top, left = (generator.integers(length - side + 1) for length in image.shape[:2])
        crop = image[top : top + side, left : left + side]
        crops.append(crop[:, ::-1] if generator.random() < 0.5 else crop)
    return _to_tensor(crops)


def _middles(images: list[np.ndarray], side: int) -> Tensor:
    tops_lefts = [((i.shape[0] - side) // 2, (i.shape[1] - side) // 2) for i in images]
    return _to_tensor(
        [i[top : top + side, left : left + side] for i, (top, left) in zip(images, tops_lefts, strict=True)]
    )


def _to_tensor(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
