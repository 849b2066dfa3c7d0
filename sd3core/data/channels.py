"""Splits a loaded image into colour and transparency, with all its bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from sd3core.data.colour_tags import GREY_WITH_ALPHA, Png
from sd3core.errors import DataError

WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
BITS, PHOTOMETRIC, PLANES = 258, 262, 284  # TIFF's tags
MIN_IS_WHITE, SEPARATE = 0, 2
# A raw mode keeps the first byte of the pairs that it says are big-endian, so with the other order it keeps the low one.
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass
class Channels:
    """An image without its transparency, and that."""

    colour: Image.Image  # "L", "RGB", "CMYK" or "LAB", 8 bits
    alpha: Image.Image | None  # "L"; None where nothing is transparent
    deep: Callable[[], np.ndarray | None]  # the colour as uint16 (H, W, 1 or 3), where the file has more than 8 bits


def split_channels(image: Image.Image, png: Png | None, reopen: Callable[[], Image.Image]) -> Channels:
    """`image`: loaded. `png`: what its file says where it is a PNG. `reopen`: the same image, not loaded.

    Raises DataError for pixels whose range is not known.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _deep_grey(image, png)
    if image.mode in ("I", "F"):
        raise DataError("32-bit pixels, whose range is not known; save it with 8 or 16 bits")
    deep = lambda: _deep_colour(image, png, reopen)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        alpha = image.getchannel("A")
        is_unused = image.format == "BMP" and alpha.getextrema() == (0, 0)  # written by programs that know no alpha
        is_grey = image.mode == "LA" or (png is not None and png.colour_type == GREY_WITH_ALPHA)
        colour = image.getchannel(0) if is_grey else image.convert("RGB")
        return Channels(colour, None if is_unused else _or_none(alpha), deep)
    colour = image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("L" if image.mode == "1" else "RGB")
    alpha = None
    if png is not None and png.transparent is not None:
        alpha = _where_transparent(colour, deep, png)
    return Channels(colour, alpha, deep)


def mend_planes(image: Image.Image) -> None:
    """Pillow reads a TIFF of 16 bits in separate planes, not compressed, as if it had 8: half of it, and as noise."""
    if image.format != "TIFF" or image.tag_v2.get(PLANES) != SEPARATE or bits_of(image) != 16:
        return
    order = "B" if image.tag_v2.prefix == b"MM" else "L"
    image.tile = [
        tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) if tile.args[0] in "RGBA" else tile
        for tile in image.tile
    ]


def bits_of(image: Image.Image) -> int:
    """Bits of a TIFF's samples."""
    return image.tag_v2.get(BITS, (1,))[0]


def _deep_grey(image: Image.Image, png: Png | None) -> Channels:
    values = np.clip(np.asarray(image), 0, 65535).astype(np.uint16)
    if image.format == "TIFF":
        if bits_of(image) == 12:
            values = values << 4 | values >> 8
        if image.tag_v2.get(PHOTOMETRIC) == MIN_IS_WHITE:
            values = 65535 - values
    alpha = None
    if png is not None and png.transparent is not None:
        alpha = _or_none(Image.fromarray(np.where(values == png.transparent[0], 0, 255).astype(np.uint8)))
    return Channels(Image.fromarray((values >> 8).astype(np.uint8)), alpha, lambda: values[..., None])


def _where_transparent(colour: Image.Image, deep: Callable[[], np.ndarray | None], png: Png) -> Image.Image | None:
    """The alpha of a PNG with one transparent colour, which tRNS names in the file's own bits."""
    if png.bits == 16:
        values, wanted = deep(), np.array(png.transparent)
    else:
        most = 2**png.bits - 1
        values, wanted = np.asarray(colour), (np.array(png.transparent) & most) * (255 // most)
    matches = values == wanted
    matches = matches.all(-1) if matches.ndim == 3 else matches
    return _or_none(Image.fromarray(np.where(matches, 0, 255).astype(np.uint8)))


def _deep_colour(image: Image.Image, png: Png | None, reopen: Callable[[], Image.Image]) -> np.ndarray | None:
    """Pillow keeps the high bytes of 16 bits; the low ones come by reading the file with the other byte order.

    None also for a TIFF in separate planes that are compressed: there Pillow chooses the order itself.
    """
    bits = png.bits if png is not None else bits_of(image) if image.format == "TIFF" else 8
    if bits != 16 or (image.format == "TIFF" and image.tag_v2.get(PLANES) == SEPARATE and image.use_load_libtiff):
        return None
    low = reopen()
    mend_planes(low)
    raw_modes = {tile.args if isinstance(tile.args, str) else tile.args[0] for tile in low.tile}
    if raw_modes == {"LA;16B"}:
        low.tile = [tile._replace(args="RGBA") for tile in low.tile]  # grey, its low byte, alpha, its low byte
        low.load()
        pairs = np.asarray(low)[..., :2].astype(np.uint16)
        return (pairs[..., :1] << 8) | pairs[..., 1:]
    if not all(_is_deep(raw_mode) for raw_mode in raw_modes):
        return None
    low.tile = [tile._replace(args=_other_order(tile.args)) for tile in low.tile]
    low.load()
    high = np.asarray(image)[..., :3].astype(np.uint16)
    return (high << 8) | np.asarray(low)[..., :3]


def _is_deep(raw_mode: str) -> bool:
    bands, _, depth = raw_mode.partition(";")
    return bands in ("RGB", "RGBX", "RGBA", *"RGBA") and depth in ("16L", "16B", "16N")


def _other_order(args: str | tuple) -> str | tuple:
    raw_mode, rest = (args, None) if isinstance(args, str) else (args[0], args[1:])
    swapped = raw_mode[:-1] + OTHER_ORDER[raw_mode[-1]]
    return swapped if rest is None else (swapped, *rest)


def _or_none(alpha: Image.Image) -> Image.Image | None:
    return None if alpha.getextrema()[0] == 255 else alpha
