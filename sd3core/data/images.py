"""From the bytes of any image file to the pixels of one bucket."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sd3core.errors import DataError

# Raster formats only: PIL's others call programs (EPS) or are not pictures. A phone's MPO opens as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@dataclass(frozen=True)
class Crop:
    """Where a bucket's pixels lie in the resized image, in its px."""

    top: int
    left: int
    height: int
    width: int


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """The picture a viewer shows, as RGB: turned by its EXIF orientation, transparency over white, 16 bits cut to 8.

    Raises DataError with a short reason that names no file, so that rejects can be counted by reason.
    """
    return _upright_rgb(_open(data, max_pixels))


def decode_image_and_format(data: bytes, max_pixels: int) -> tuple[Image.Image, str]:
    """decode_image, and the format of the bytes as PIL names it ("JPEG", "PNG", "WEBP", ...)."""
    image = _open(data, max_pixels)
    name = "JPEG" if image.format == "MPO" else image.format  # an MPO file is a JPEG with more pictures behind it
    return _upright_rgb(image), str(name)


def crop_to(image: Image.Image, height: int, width: int) -> tuple[np.ndarray, Crop]:
    """Resizes (Lanczos) until the image covers height x width, and takes the centre. -> uint8 (height, width, 3), Crop.

    Only the part of the source that is kept is resampled, so an extreme aspect costs no memory.
    """
    scale = max(height / image.height, width / image.width)
    resized_height = max(height, round(image.height * scale))
    resized_width = max(width, round(image.width * scale))
    crop = Crop((resized_height - height) // 2, (resized_width - width) // 2, height, width)
    across, down = image.width / resized_width, image.height / resized_height
    box = (crop.left * across, crop.top * down, (crop.left + width) * across, (crop.top + height) * down)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)), crop


def to_model_range(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    pixels = torch.tensor(images).permute(0, 3, 1, 2)  # a copy: arrays from PIL are read-only
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only, and refuses by what it says."""
    if not data:
        raise DataError("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL's own limit must not be below the recipe's
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        raise DataError("not an image that can be read (save it as JPEG or PNG)") from None
    except Image.DecompressionBombError:
        raise DataError(_too_many(max_pixels)) from None
    except Exception:  # plugins raise what they like on damaged headers
        raise DataError("damaged image") from None
    if image.width * image.height > max_pixels:
        raise DataError(_too_many(max_pixels))
    if frames > 1:
        raise DataError("animated, or several pictures in one file; save the one you want as a file of its own")
    return image


def _too_many(max_pixels: int) -> str:
    return f"more than {max_pixels:,} pixels (data.max_image_pixels)"


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except Exception:  # OSError, SyntaxError, zlib.error, struct.error: by the plugin
        raise DataError("truncated or damaged image") from None
    try:
        return _to_rgb(_turned(image))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"pixels of mode {image.mode} cannot be read as RGB ({type(error).__name__})") from None


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF beside good pixels: viewers show such an image as it is stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        high_bytes = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255)
        return Image.fromarray(high_bytes.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError("32-bit pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "La", "PA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
