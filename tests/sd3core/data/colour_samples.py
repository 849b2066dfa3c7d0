"""ICC profiles and PNGs made by hand, and what their colours are in sRGB by the formulas: the other side of the colour tests."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

WHITE_D65, WHITE_D50 = (0.3127, 0.3290), (0.3457, 0.3585)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), WHITE_D65)
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), WHITE_D65)
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), WHITE_D65)
PROPHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), WHITE_D50)
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def srgb_light(v):
    return np.where(v <= 0.04045, v / 12.92, ((np.maximum(v, 0) + 0.055) / 1.055) ** 2.4)


def srgb_levels(light):
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def xyz(x, y):
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(space):
    """(3, 3): linear RGB -> XYZ under D50."""
    *primaries, white = (xyz(*place) for place in space)
    columns = np.stack(primaries, 1)
    scaled = columns * np.linalg.solve(columns, white)
    return np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD @ scaled


def in_srgb(values, space, light):
    """`values` (..., 3) from 0 to 1 in the colours of `space` with the curve `light` -> levels of sRGB, not rounded."""
    return srgb_levels(light(values) @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(space)).T)


def _tag(kind: bytes, data: bytes) -> bytes:
    return kind + bytes(4) + data


def _fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)


def profile(space=None, exponent: float | None = None, kind: bytes = b"RGB ") -> bytes:
    """A version 2 profile: matrix and curve for RGB, a curve for grey. `exponent` None: sRGB's curve, as a table."""
    if exponent is None:
        table = np.rint(srgb_light(np.linspace(0, 1, 1024)) * 65535).astype(">u2").tobytes()
        curve = _tag(b"curv", struct.pack(">I", 1024) + table)
    else:
        curve = _tag(b"curv", struct.pack(">IH", 1, round(exponent * 256)))
    tags = {b"wtpt": _tag(b"XYZ ", _fixed(D50))}
    if kind == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, column in zip("rgb", to_xyz(space).T, strict=True):
            tags |= {f"{name}XYZ".encode(): _tag(b"XYZ ", _fixed(column)), f"{name}TRC".encode(): curve}
    return _file(tags, b"mntr", kind, b"XYZ ")


def cmyk_profile() -> bytes:
    """A printer's profile (lut16, CMYK -> Lab) whose inks take light away without each other: Y = product of (1 - ink)."""
    nodes = 9
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, nodes)] * 4, indexing="ij"), -1).reshape(-1, 4)
    codes = np.stack([lab_of_inks(grid)[:, 0] * 652.8, *((lab_of_inks(grid)[:, 1:] + 128).T * 256)], -1)
    ramp = struct.pack(">2H", 0, 65535)
    lut = struct.pack(">4B9i2H", 4, 3, nodes, 0, 65536, 0, 0, 0, 65536, 0, 0, 0, 65536, 2, 2)
    lut += ramp * 4 + np.rint(np.clip(codes, 0, 65535)).astype(">u2").tobytes() + ramp * 3
    return _file({b"A2B0": _tag(b"mft2", lut), b"wtpt": _tag(b"XYZ ", _fixed(D50))}, b"prtr", b"CMYK", b"Lab ")


def lab_of_inks(inks):
    """(n, 4) from 0 to 1 -> (n, 3) Lab. Black alone darkens; cyan, magenta and yellow move the hue, smoothly."""
    c, m, y, k = inks.T
    light = 100 * (1 - k) * (1 - 0.25 * (c + m) - 0.05 * y)
    return np.stack([light, 30 * (m - c) * (1 - k), 30 * (y - c) * (1 - k)], -1)


def lab_to_srgb(lab):
    """Lab under D50 -> levels of sRGB."""
    f = (lab[:, 0] + 16) / 116
    f = np.stack([f + lab[:, 1] / 500, f, f - lab[:, 2] / 200], -1)
    values = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return srgb_levels(values @ np.linalg.inv(to_xyz(SRGB)).T)


def _file(tags: dict[bytes, bytes], device: bytes, space: bytes, connection: bytes) -> bytes:
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">2I", start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, device, space, connection, b"acsp")
    return header + _fixed(D50) + bytes(48) + table + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, bits: int, colour_type: int, *before: bytes, after: bytes = b"") -> bytes:
    """A PNG of `samples` (H, W, C) in `bits` bits, with the chunks `before` and `after` its pixels. No filter."""
    height, width, _channels = samples.shape
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in samples]
    else:
        flat = (np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]).reshape(height, -1)
        rows = [np.packbits(row).tobytes() for row in flat]
    header = struct.pack(">2I5B", width, height, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()
