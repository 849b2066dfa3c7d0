"""Converts colours to sRGB by what an image's profile or file says of them.

LittleCMS does the arithmetic.

Relative colorimetric with black point compensation, as editors and browsers show pictures. A profile whose effect is
sRGB's, whatever it is called, changes nothing and costs nothing.
"""

from __future__ import annotations

import io
import struct
from functools import lru_cache, partial

import numpy as np
from PIL import Image, ImageCms

Chromaticities = tuple[tuple[float, float], ...]  # x, y of white, red, green, blue

SRGB: Chromaticities = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
PRIMARIES: dict[int, Chromaticities] = {  # by their number in ITU-T H.273, which PNG's cICP and AVIF name
    1: SRGB,
    2: SRGB,  # unspecified
    5: ((0.3127, 0.3290), (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: ((0.3127, 0.3290), (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: ((0.3127, 0.3290), (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: ((0.3127, 0.3290), (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: ((0.3127, 0.3290), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
SRGB_CURVE = 0.0  # in the place of an exponent
# Video's curves (1, 6, 14, 15) are shown as sRGB's. PQ and HLG (16, 18) are of other brightness and not in it.
EXPONENTS = {**dict.fromkeys((1, 2, 6, 13, 14, 15), SRGB_CURVE), 4: 2.2, 5: 2.8, 8: 1.0}
SAME_EXPONENT = 0.05  # of 2.2, relative: what the PNG specification and libpng leave alone
SAME_LEVELS = 1  # of 255, between a profile's effect and none: sRGB's own profiles round so
STEEP_LEVELS = 3  # of the result from one of 8 bits to the next: above, 8 bits are too few to go through
STRIP_PIXELS = 2**20
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
CURVE_POINTS = 4096


class UnusableProfile(Exception):
    """Colours that cannot be told: a damaged profile, one of another colour space, or a brightness that sRGB has not."""


def is_srgb(profile: bytes, mode: str) -> bool:
    """Whether the profile leaves an image of this mode ("L", "RGB" or "CMYK") as it is. Raises UnusableProfile."""
    return _transform(profile, mode) is None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """An "L", "RGB" or "CMYK" image in the colours of `profile` -> sRGB, "RGB". Raises UnusableProfile."""
    transform = _transform(profile, image.mode)
    if transform is None:
        return image.convert("RGB")
    if image.mode == "L":
        return Image.merge("RGB", [image.point(curve.tolist()) for curve in transform.T])
    return transform.apply(image)


def deep_to_srgb(pixels: np.ndarray, profile: bytes) -> Image.Image:
    """uint16 (H, W, 1 or 3) in the colours of `profile` -> sRGB, "RGB", 8 bits. Raises UnusableProfile.

    LittleCMS is reached with 8 bits only, too few for dark linear colours: there its answers at the neighbouring levels
    are interpolated.
    """
    channels = pixels.shape[2]
    transform = _transform(profile, "L" if channels == 1 else "RGB")
    if transform is None:
        return Image.fromarray((pixels >> 8).astype(np.uint8).repeat(3 // channels, 2))
    if channels == 1:
        levels = np.arange(65536) / 257
        curves = [np.interp(levels, np.arange(256), curve) for curve in transform.T]
        return Image.fromarray(np.rint(np.stack(curves, -1)).astype(np.uint8)[pixels[..., 0]])
    if not _is_steep(profile):
        return transform.apply(Image.fromarray(((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)))
    rows = max(1, STRIP_PIXELS // pixels.shape[1])
    strips = [_interpolated(transform, pixels[top : top + rows]) for top in range(0, len(pixels), rows)]
    return Image.fromarray(np.concatenate(strips))


def gamma_profile(gamma: float, chromaticities: Chromaticities | None) -> bytes | None:
    """The profile of PNG's gAMA and cHRM, or None where they say what sRGB says. `gamma`: as stored, about 1 / 2.2."""
    if not gamma > 0:
        return None
    exponent = 1 / gamma
    is_usual = abs(exponent / 2.2 - 1) <= SAME_EXPONENT
    chromaticities = chromaticities or SRGB
    if is_usual and np.allclose(chromaticities, SRGB, atol=0.001):
        return None
    return _made_profile(chromaticities, SRGB_CURVE if is_usual else exponent)


def coded_profile(primaries: int, transfer: int) -> bytes | None:
    """The profile of two code points of ITU-T H.273, or None where they say sRGB. Raises UnusableProfile."""
    if primaries not in PRIMARIES or transfer not in EXPONENTS:
        raise UnusableProfile
    if PRIMARIES[primaries] == SRGB and EXPONENTS[transfer] == SRGB_CURVE:
        return None
    return _made_profile(PRIMARIES[primaries], EXPONENTS[transfer])


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | np.ndarray | None:
    """The transform from the profile's colours to sRGB; for "L" its effect on every level, (256, 3). None where it changes nothing."""
    space = _space(profile)
    if mode == "L" and space in ("GRAY", "RGB"):
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        curves = np.asarray(_built(profile, "L" if space == "GRAY" else "RGB", ramp))[0]  # (256, 3)
        same = np.abs(curves.astype(int) - np.arange(256)[:, None]).max() <= SAME_LEVELS
        return None if same else curves
    if space != mode:
        raise UnusableProfile
    build = partial(_built, profile, mode)
    if mode == "RGB":
        probe = _probe()
        if np.abs(np.asarray(build(probe)).astype(int) - np.asarray(probe)).max() <= SAME_LEVELS:
            return None
    return build()


def _space(profile: bytes) -> str:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except (OSError, ValueError):
        raise UnusableProfile from None


def _built(profile: bytes, mode: str, image: Image.Image | None = None):
    """The transform from `mode` to sRGB, or what it makes of `image`, which is small: every value by itself then."""
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC
    if image is not None:
        flags |= ImageCms.Flags.NOOPTIMIZE
    try:
        transform = ImageCms.ImageCmsTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=flags,
        )
    except (OSError, ValueError):
        raise UnusableProfile from None
    return transform if image is None else transform.apply(image.convert(mode))


@lru_cache(maxsize=32)
def _is_steep(profile: bytes) -> bool:
    ramp = np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2)
    levels = np.asarray(_built(profile, "RGB", Image.fromarray(ramp))).astype(int)
    return bool(np.abs(np.diff(levels, axis=1)).max() > STEEP_LEVELS)


@lru_cache(maxsize=1)
def _probe() -> Image.Image:
    """Every grey, and a lattice of colours."""
    levels = np.linspace(0, 255, 9).round()
    lattice = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    return Image.fromarray(np.concatenate([lattice, np.arange(256)[:, None].repeat(3, 1)]).astype(np.uint8)[None])


def _interpolated(transform: ImageCms.ImageCmsTransform, pixels: np.ndarray) -> np.ndarray:
    """Trilinear between the transform's answers at the eight neighbours with 8 bits. uint16 (H, W, 3) -> uint8."""
    low = pixels // 257
    part = (pixels - low * 257).astype(np.float32) / 257
    total = np.zeros(pixels.shape, np.float32)
    for corner in np.ndindex(2, 2, 2):
        neighbour = np.minimum(low + np.array(corner, np.uint16), 255).astype(np.uint8)
        weight = np.where(corner, part, 1 - part).prod(-1, keepdims=True)
        if weight.any():
            total += weight * np.asarray(transform.apply(Image.fromarray(neighbour)))
    return np.rint(total).astype(np.uint8)


@lru_cache(maxsize=32)
def _made_profile(chromaticities: Chromaticities, exponent: float) -> bytes:
    """An ICC profile (version 2.4, matrix and curve) of these primaries. ICC.1:2001-04, sections 6.1 and 6.5."""
    try:
        matrix = _to_xyz_d50(chromaticities)
    except (np.linalg.LinAlgError, ZeroDivisionError):
        raise UnusableProfile from None
    if not np.isfinite(matrix).all() or np.abs(matrix).max() >= 2**15:
        raise UnusableProfile
    linear = _linear_light(np.linspace(0, 1, CURVE_POINTS), exponent)
    curve = b"curv" + bytes(4) + struct.pack(">I", CURVE_POINTS) + np.rint(linear * 65535).astype(">u2").tobytes()
    tags = {b"wtpt": _xyz(D50)}
    for position, channel in enumerate((b"r", b"g", b"b")):
        tags |= {channel + b"XYZ": _xyz(matrix[:, position]), channel + b"TRC": curve}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header += _xyz(D50)[8:] + bytes(48)
    return header + table + body


def _to_xyz_d50(chromaticities: Chromaticities) -> np.ndarray:
    """(3, 3): linear RGB -> XYZ, white moved to D50 by Bradford's matrix."""
    white, *primaries = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in chromaticities)
    columns = np.stack(primaries, axis=1)
    adapted = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
    return adapted @ (columns * np.linalg.solve(columns, white))


def _linear_light(values: np.ndarray, exponent: float) -> np.ndarray:
    if exponent != SRGB_CURVE:
        return values**exponent
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))
