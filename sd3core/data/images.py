"""From the bytes of any image file to the pixels of one bucket."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from sd3core.data.channels import Channels, mend_planes, split_channels
from sd3core.data.colour import UnusableProfile, deep_to_srgb, is_srgb, to_srgb
from sd3core.data.colour_tags import PNG_MAGIC, UNUSABLE, Png, avif_profile, bmp_profile, read_png
from sd3core.errors import DataError, UserError, is_of_the_machine

if TYPE_CHECKING:
    from torch import Tensor

    from sd3core.recipe import Data

# Raster formats only: PIL's others call programs (EPS) or are not pictures. A phone's MPO opens as JPEG.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
TURNS = {  # EXIF's orientation: how the stored picture is turned to stand upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What an owner of images should be told, counted in a raw shard's done record.
TRANSPARENT = "transparent in parts"
CONVERTED = "other colours made sRGB"
UNKNOWN_COLOURS = "colour profile of no use"
BARE_CMYK = "CMYK without a profile"


@dataclass(frozen=True)
class PixelRules:
    """What of a recipe decides which images are read and what becomes of their pixels."""

    max_pixels: int
    background: str = "white"  # a name or #rrggbb: what transparent parts lie over

    @classmethod
    def of(cls, data: Data) -> PixelRules:
        return cls(data.max_image_pixels, data.background)


@dataclass(frozen=True)
class DecodedImage:
    """What a viewer shows of a file."""

    image: Image.Image  # "RGB", in sRGB
    format: str  # as PIL names it: "JPEG", "PNG", "WEBP", ...
    notes: tuple[str, ...]  # of those above


@dataclass(frozen=True)
class Crop:
    """Where a bucket's pixels lie in the resized image, in its px."""

    top: int
    left: int
    height: int
    width: int


def read_picture(data: bytes, rules: PixelRules) -> DecodedImage:
    """The picture a viewer shows: in sRGB, turned by its EXIF orientation, transparency over rules.background, 8 bits.

    Raises DataError with a short reason that names no file, so that rejects can be counted by reason. What is not the
    file's fault (no memory) is raised as it is, so that it becomes no reject.
    """
    png = read_png(data) if data.startswith(PNG_MAGIC) else None
    content = data if png is None else png.pixels
    file = _open(content, rules.max_pixels)
    with _rejecting("truncated or damaged image"):  # OSError, SyntaxError, zlib.error, struct.error: by the plugin
        mend_planes(file)
        file.load()
    with _rejecting(f"pixels of mode {file.mode} cannot be read as RGB"):
        channels = split_channels(file, png, lambda: _open(content, rules.max_pixels))
        rgb, notes = _in_srgb(channels, file, png, data)
        if channels.alpha is not None:
            notes.append(TRANSPARENT)
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, rules.background), channels.alpha)
        turn = TURNS.get(_orientation(file))
        rgb = rgb.transpose(turn) if turn is not None else rgb
    rgb.info = {}  # else PIL would write the old profile beside the new pixels
    name = "JPEG" if file.format == "MPO" else file.format  # an MPO file is a JPEG with more pictures behind it
    return DecodedImage(rgb, str(name), tuple(notes))


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which image was being read when memory or files ran out: nobody could find it otherwise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_of_the_machine(error):
            raise
        words = " ".join(str(error).split()) or "out of memory"
        mend = "fewer compute.actors leave more to each; if it is always this image, take it out"
        raise MemoryError(f"while reading {name}: {words}; {mend}") from error


def decode_image(data: bytes, rules: PixelRules) -> Image.Image:
    """read_picture's image alone."""
    return read_picture(data, rules).image


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
    import torch  # here: whoever lists, checks or crops images loads none

    pixels = torch.tensor(images).permute(0, 3, 1, 2)  # a copy: arrays from PIL are read-only
    return pixels.to(torch.float32, memory_format=torch.contiguous_format) / 127.5 - 1


def enlargement(size: tuple[int, int], height: int, width: int) -> float:
    """How much larger crop_to makes an image of this (width, height), each way; below 1 where it makes it smaller."""
    return max(height / size[1], width / size[0])


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header only, and refuses by what it says."""
    if not data:
        raise DataError("empty file")
    if Image.MAX_IMAGE_PIXELS is not None and Image.MAX_IMAGE_PIXELS < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels  # PIL's own limit must not be below the recipe's
    with _rejecting("damaged image"):  # plugins raise what they like on damaged headers
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        except UnidentifiedImageError:
            raise DataError("not an image that can be read (save it as JPEG or PNG)") from None
        except Image.DecompressionBombError:
            raise DataError(_too_many(max_pixels)) from None
    if image.width * image.height > max_pixels:
        raise DataError(_too_many(max_pixels))
    if frames > 1:
        raise DataError("animated, or several pictures in one file; save the one you want as a file of its own")
    return image


def _too_many(max_pixels: int) -> str:
    return f"more than {max_pixels:,} pixels (data.max_image_pixels)"


@contextmanager
def _rejecting(reason: str) -> Iterator[None]:
    """Makes any error a reject with this reason, but those of the machine: they say nothing of the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise DataError(reason) from None


def _in_srgb(channels: Channels, file: Image.Image, png: Png | None, data: bytes) -> tuple[Image.Image, list[str]]:
    """The colours as sRGB, and what there is to tell. Colours that nothing usable names are taken as sRGB."""
    colour = channels.colour
    try:
        profile = _profile(file, png, data) if colour.mode != "LAB" else None
        if profile is None:
            return colour.convert("RGB"), [BARE_CMYK] if colour.mode == "CMYK" else []
        if is_srgb(profile, colour.mode):
            return colour.convert("RGB"), []
        deep = channels.deep()
        return to_srgb(colour, profile) if deep is None else deep_to_srgb(deep, profile), [CONVERTED]
    except UnusableProfile:
        return colour.convert("RGB"), [UNKNOWN_COLOURS]


def _profile(file: Image.Image, png: Png | None, data: bytes) -> bytes | None:
    """The ICC profile of the colours, UNUSABLE for one that is not whole, None for sRGB."""
    if png is not None:
        return png.profile()
    if "icc_profile" in file.info:
        return file.info["icc_profile"] or UNUSABLE
    of_format = {"AVIF": avif_profile, "BMP": bmp_profile}.get(file.format)
    return of_format(data) if of_format else None


def _orientation(file: Image.Image) -> int:
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # damaged EXIF beside good pixels: viewers show such an image as it is stored
        if is_of_the_machine(error):
            raise
        return 1
