"""Bytes from outside into 8-bit RGB pictures, and pictures into what the VAE takes. Anything odd is a DataError with a short reason."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from sd3core.errors import DataError

SIXTEEN_BIT_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
STORED_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # kept as they came


@dataclass(frozen=True)
class Crop:
    """The window taken from the resized image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """8-bit RGB: turned as EXIF says, 16-bit scaled, CMYK and palettes converted, transparency laid over white.

    Raises DataError for bytes that are no image, are cut off, are animated, or hold more than `max_pixels`, which is read from
    the header before anything is unpacked.
    """
    if not data:
        raise DataError("the file is empty")
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked below
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > max_pixels:
            raise DataError(f"{image.width} x {image.height} pixels are more than data.max_image_pixels {max_pixels}")
        if getattr(image, "n_frames", 1) > 1:
            raise DataError(f"animated ({image.n_frames} frames)")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise DataError("not an image in a known format") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL's decoders raise for broken files
        raise DataError(f"unreadable image ({' '.join(str(error).split()) or type(error).__name__})") from None


def stored_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` for an image that is stored as it came; None for other formats."""
    with Image.open(io.BytesIO(data)) as image:
        return STORED_FORMATS.get(image.format or "")


def encode_png_lossless(image: Image.Image) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format="PNG", compress_level=4)
    return sink.getvalue()


def crop_to(image: Image.Image, height: int, width: int) -> tuple[np.ndarray, Crop]:
    """Resized (Lanczos) until it just covers height x width, then cropped at the centre. -> uint8 (height, width, 3)."""
    scale = max(height / image.height, width / image.width)
    resized_height, resized_width = max(height, math.ceil(image.height * scale - 1e-6)), max(width, math.ceil(image.width * scale - 1e-6))
    if (resized_width, resized_height) != image.size:
        image = image.resize((resized_width, resized_height), Image.Resampling.LANCZOS)
    top, left = (resized_height - height) // 2, (resized_width - width) // 2
    pixels = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
    return pixels, Crop(top, left, height, width)


def to_model_range(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], as the VAE takes it."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        wide = np.asarray(image).astype(np.int64)
        scale = 257 if wide.max(initial=0) > 255 else 1  # 65535 / 255
        image = Image.fromarray(np.clip(wide // scale, 0, 255).astype(np.uint8), mode="L")
    if image.mode == "F":
        raise DataError("floating-point pixels: their range is not known")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        with_alpha = image.convert("RGBA")
        image = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image.alpha_composite(with_alpha)
    return image.convert("RGB")
