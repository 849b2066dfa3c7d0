"""Every mode that a file can have, with and without transparency, against values worked out by hand."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import tifffile
from colour_samples import chunk, encoded, png
from PIL import Image

from sd3core.data.channels import split_channels
from sd3core.data.images import TRANSPARENT, PixelRules, decode_image, read_picture
from sd3core.errors import DataError

RULES = PixelRules(10**6)
BACK = (10, 200, 30)
OVER = PixelRules(10**6, "#0ac81e")


def image(mode: str, *values, size=None, palette=None) -> Image.Image:
    made = Image.new(mode, size or (len(values), 1))
    if palette:
        made.putpalette(palette)
    made.putdata(values)
    return made


def tiff(values, **options) -> bytes:
    sink = io.BytesIO()
    tifffile.imwrite(sink, values, **options)
    return sink.getvalue()


def grey16(*values):
    return np.array(values, np.uint16)[None, :, None]


def trns(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def mixed(colour, alpha):
    return tuple(round((c * alpha + b * (255 - alpha)) / 255) for c, b in zip(colour, BACK, strict=True))


PALETTE = [10, 20, 30, 40, 50, 60, 70, 80, 90]
SEE = [BACK]  # nothing but what lies under it
PLTE = chunk(b"PLTE", bytes(PALETTE))
FILES = {  # a file, and the colours of its one row over BACK
    "1": (encoded(image("1", 0, 255)), [(0,) * 3, (255,) * 3]),
    "1 bit, tRNS": (png(np.array([[[0], [1]]]), 1, 0, trns(1)), [(0,) * 3, *SEE]),
    "2 bits, tRNS": (png(np.array([[[0], [1], [2], [3]]]), 2, 0, trns(2)), [(0,) * 3, (85,) * 3, *SEE, (255,) * 3]),
    "4 bits, tRNS": (png(np.array([[[0], [7], [15]]]), 4, 0, trns(7)), [(0,) * 3, *SEE, (255,) * 3]),
    "8 bits, tRNS": (png(np.array([[[0], [7], [255]]]), 8, 0, trns(7)), [(0,) * 3, *SEE, (255,) * 3]),
    "8 bits, tRNS above them": (png(np.array([[[0], [7]]]), 8, 0, trns(0x1207)), [(0,) * 3, *SEE]),
    "16 bits": (png(grey16(0, 256, 65535), 16, 0), [(0,) * 3, (1,) * 3, (255,) * 3]),
    "16 bits, tRNS": (png(grey16(0, 1, 65535), 16, 0, trns(0)), [*SEE, (0,) * 3, (255,) * 3]),
    "16 bits, tRNS by its low byte": (png(grey16(0x1234, 0x1235), 16, 0, trns(0x1235)), [(0x12,) * 3, *SEE]),
    "tRNS cut short": (png(np.array([[[0], [7]]]), 8, 0, chunk(b"tRNS", b"\0")), [(0,) * 3, (7,) * 3]),
    "LA": (encoded(image("LA", (90, 255), (90, 0), (90, 51))), [(90,) * 3, *SEE, mixed((90,) * 3, 51)]),
    "LA, 16 bits": (png(np.array([[[0x5A00, 0xFFFF], [0x5A00, 0]]]), 16, 4), [(0x5A,) * 3, *SEE]),
    "RGB": (encoded(image("RGB", (1, 2, 3))), [(1, 2, 3)]),
    "RGB, tRNS": (png(np.array([[[1, 2, 3], [1, 2, 4]]]), 8, 2, trns(1, 2, 4)), [(1, 2, 3), *SEE]),
    "RGB, 16 bits": (png(np.array([[[256, 512, 65535]]]), 16, 2), [(1, 2, 255)]),
    "RGB, 16 bits, tRNS": (
        png(np.array([[[256, 512, 65535], [256, 512, 65534]]]), 16, 2, trns(256, 512, 65534)),
        [(1, 2, 255), *SEE],
    ),
    "RGBA": (encoded(image("RGBA", (1, 2, 3, 255), (1, 2, 3, 0), (100, 0, 200, 102))),
             [(1, 2, 3), *SEE, mixed((100, 0, 200), 102)]),
    "RGBA, 16 bits": (png(np.array([[[256, 512, 65535, 65535], [256, 512, 65535, 0]]]), 16, 6), [(1, 2, 255), *SEE]),
    "P": (encoded(image("P", 0, 1, 2, palette=PALETTE)), [(10, 20, 30), (40, 50, 60), (70, 80, 90)]),
    "P, an index": (encoded(image("P", 0, 1, 2, palette=PALETTE), transparency=1), [(10, 20, 30), *SEE, (70, 80, 90)]),
    "P, an alpha each": (
        encoded(image("P", 0, 1, 2, palette=PALETTE), transparency=bytes([255, 0, 51])),
        [(10, 20, 30), *SEE, mixed((70, 80, 90), 51)],
    ),
    "P of 2 bits, tRNS shorter than its palette": (
        png(np.array([[[0], [1], [2]]]), 2, 3, PLTE, chunk(b"tRNS", bytes([0]))),
        [*SEE, (40, 50, 60), (70, 80, 90)],
    ),
    "GIF, an index": (encoded(image("P", 0, 1, 2, palette=PALETTE), "GIF", transparency=2), [(10, 20, 30), (40, 50, 60), *SEE]),
    "GIF of greys, an index": (encoded(image("L", 0, 5, 255), "GIF", transparency=5), [(0,) * 3, *SEE, (255,) * 3]),
    "WebP": (encoded(image("RGBA", (1, 2, 3, 255), (1, 2, 3, 0)), "WEBP", lossless=True, exact=True), [(1, 2, 3), *SEE]),
    "CMYK": (encoded(image("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "TIFF"), [(0, 255, 255), (0, 0, 0)]),
    "LAB": (encoded(image("LAB", (255, 128, 128), (0, 128, 128)), "TIFF"), [(255,) * 3, (0,) * 3]),
    "YCbCr": (encoded(image("YCbCr", (128, 128, 128)), "TIFF"), [(128,) * 3]),
    "PPM of 16 bits": (b"P5 3 1 65535\n" + np.array([0, 256, 65535], ">u2").tobytes(), [(0,) * 3, (1,) * 3, (255,) * 3]),
    "PPM of 10 bits": (b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes(), [(0,) * 3, (255,) * 3]),
    "TIFF, little-endian": (tiff(np.array([[0, 256, 65535]], np.uint16), byteorder="<"), [(0,) * 3, (1,) * 3, (255,) * 3]),
    "TIFF, big-endian": (tiff(np.array([[0, 256, 65535]], np.uint16), byteorder=">"), [(0,) * 3, (1,) * 3, (255,) * 3]),
    "TIFF, white is 0": (tiff(np.array([[0, 255]], np.uint8), photometric="miniswhite"), [(255,) * 3, (0,) * 3]),
    "TIFF of 16 bits, white is 0": (tiff(np.array([[0, 65535]], np.uint16), photometric="miniswhite"), [(255,) * 3, (0,) * 3]),
    "TIFF of 16 bits in planes": (
        tiff(np.array([[[256, 512]], [[0, 65535]], [[768, 0]]], np.uint16), photometric="rgb", planarconfig="separate"),
        [(1, 0, 3), (2, 255, 0)],
    ),
    "TIFF of 16 bits in planes, big-endian": (
        tiff(np.array([[[256, 512]], [[0, 65535]], [[768, 0]]], np.uint16), photometric="rgb", planarconfig="separate", byteorder=">"),
        [(1, 0, 3), (2, 255, 0)],
    ),
    "TIFF, alpha in the colours": (  # associated: 51 of 255 is left of 250
        tiff(np.array([[[50, 10, 0, 51], [1, 2, 3, 255]]], np.uint8), photometric="rgb", extrasamples=["assocalpha"]),
        [mixed((250, 50, 0), 51), (1, 2, 3)],
    ),
    "TIFF, grey with alpha in it": (
        tiff(np.array([[[50, 51], [9, 255]]], np.uint8), photometric="minisblack", extrasamples=["assocalpha"]),
        [mixed((250,) * 3, 51), (9,) * 3],
    ),
    "TIFF, a fourth channel of no meaning": (
        tiff(np.array([[[1, 2, 3, 0]]], np.uint8), photometric="rgb", extrasamples=["unspecified"]),
        [(1, 2, 3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_mode(name):
    data, expected = FILES[name]
    picture = read_picture(data, OVER)
    found = [tuple(pixel) for pixel in np.asarray(picture.image)[0].tolist()]
    assert np.abs(np.array(found) - expected).max() <= (2 if "alpha in" in name else name == "LAB"), found
    over_white = np.asarray(decode_image(data, RULES))
    assert (TRANSPARENT in picture.notes) == (over_white != np.asarray(picture.image)).any()


@pytest.mark.parametrize(
    "mode, values, colour, alpha",
    [
        ("La", (50, 51), [250], 51),
        ("RGBa", (50, 10, 0, 51), [250, 50, 0], 51),
        ("PA", (1, 0), [40, 50, 60], 0),
        ("HSV", (0, 0, 77), [77, 77, 77], None),
        ("RGBX", (1, 2, 3, 0), [1, 2, 3], None),
        ("I;16", 0x5A00, [0x5A], None),
    ],
)
def test_modes_that_few_files_have(mode, values, colour, alpha):
    made = Image.new(mode, (1, 1))
    if mode == "PA":
        made.putpalette(PALETTE)
    made.putpixel((0, 0), values)
    channels = split_channels(made, None, lambda: made)
    assert np.asarray(channels.colour).reshape(-1).tolist() == colour
    assert (None if channels.alpha is None else channels.alpha.getpixel((0, 0))) == alpha


def test_12_bits_of_a_tiff_are_not_read_as_16():
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x00])  # 0, 4095, 2048 and four bits to fill
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 278, 279) else 3, 1, v) for tag, v in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + packed
    data = data.replace(struct.pack("<HHII", 273, 4, 1, 122), struct.pack("<HHII", 273, 4, 1, len(data) - len(packed)))
    assert np.asarray(decode_image(data, RULES))[0, :3, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_unknown_range_are_refused(mode):
    with pytest.raises(DataError, match="32-bit pixels"):
        decode_image(encoded(image(mode, 1, 2), "TIFF"), RULES)


def bmp(alpha: int, header: int = 124) -> bytes:
    """Two pixels with a mask for alpha, as version 4 or 5 has it."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", header, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks
    info = info.ljust(header, b"\0")
    pixels = bytes([3, 2, 1, alpha, 6, 5, 4, alpha])
    return b"BM" + struct.pack("<IHHI", 14 + header + 8, 0, 0, 14 + header) + info + pixels


@pytest.mark.parametrize("header", [56, 108, 124])
def test_a_bmp_whose_alpha_is_all_zero_is_opaque(header):
    picture = read_picture(bmp(0, header), OVER)
    assert np.asarray(picture.image)[0].tolist() == [[1, 2, 3], [4, 5, 6]] and picture.notes == ()
    picture = read_picture(bmp(51, header), OVER)
    assert [tuple(p) for p in np.asarray(picture.image)[0].tolist()] == [mixed((1, 2, 3), 51), mixed((4, 5, 6), 51)]
    assert picture.notes == (TRANSPARENT,)


@pytest.mark.parametrize("background, levels", [("white", 255), ("black", 0), ("grey", 128), ("#070707", 7)])
def test_the_background_is_the_recipe_s(background, levels):
    data = encoded(Image.new("RGBA", (3, 3), (9, 9, 9, 0)))
    assert np.unique(np.asarray(decode_image(data, PixelRules(100, background)))).tolist() == [levels]
    opaque = encoded(Image.new("RGBA", (3, 3), (9, 9, 9, 255)))
    picture = read_picture(opaque, PixelRules(100, background))
    assert np.unique(np.asarray(picture.image)).tolist() == [9] and picture.notes == ()
