"""A PNG's pixels are read whatever its texts and profile weigh, and no text is unpacked into memory."""

from __future__ import annotations

import json
import tracemalloc
import zlib

import numpy as np
import pytest
from colour_samples import DISPLAY_P3, chunk, encoded, png, profile
from PIL import Image, PngImagePlugin

from sd3core.data.colour_tags import read_png
from sd3core.data.images import CONVERTED, PixelRules, decode_image, read_picture
from sd3core.errors import DataError

RULES = PixelRules(10**6)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
WORKFLOW = json.dumps({"nodes": [{"id": i, "title": f"KSampler {i}"} for i in range(60_000)]}).encode()  # 2.4 MB
UTF8 = b"\0\1\0\0\0"  # iTXt: compressed by zlib, no language, no translated key
TEXTS = {
    "tEXt": chunk(b"tEXt", b"prompt\0" + WORKFLOW),
    "zTXt": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(WORKFLOW)),
    "iTXt": chunk(b"iTXt", b"workflow" + UTF8 + zlib.compress(WORKFLOW)),
    "iTXt of XMP": chunk(b"iTXt", b"XML:com.adobe.xmp" + UTF8 + zlib.compress(WORKFLOW)),
    "EXIF as text": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(WORKFLOW)),
    "many": b"".join(chunk(b"tEXt", b"k%d\0" % i + WORKFLOW) for i in range(40)),
    "an unknown method": chunk(b"zTXt", b"k\0\7abc"),
    "a wrong checksum": chunk(b"tEXt", b"k\0v")[:-1] + b"\0",
    "an unknown chunk": chunk(b"prVt", WORKFLOW),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", TEXTS)
def test_large_texts_beside_the_pixels(name, place):
    texts = TEXTS[name]
    data = png(PIXELS, 8, 2, texts) if place == "before" else png(PIXELS, 8, 2, after=texts)
    np.testing.assert_array_equal(np.asarray(decode_image(data, RULES)), PIXELS)
    assert len(read_png(data).pixels) < 400


def test_a_large_profile_is_used():
    """As a printer's or a camera's is, with tables; Pillow takes up to a MB."""
    made = bytearray(profile(DISPLAY_P3) + bytes(3 * 2**20))
    made[:4] = len(made).to_bytes(4, "big")
    data = png(PIXELS, 8, 2, chunk(b"iCCP", b"big\0\0" + zlib.compress(bytes(made))))
    plain = png(PIXELS, 8, 2, chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile(DISPLAY_P3))))
    assert read_picture(data, RULES).notes == (CONVERTED,)
    np.testing.assert_array_equal(np.asarray(decode_image(data, RULES)), np.asarray(decode_image(plain, RULES)))


def test_what_a_picture_needs_stays():
    """An animation's chunks, a palette with its alphas, EXIF, and texts that hold an orientation."""
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.fromarray(PIXELS)
    upright = np.rot90(PIXELS, -1)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>6</tiff:Orientation></x:xmpmeta>'
    hexed = b"\nexif\n%8d\n" % len(turned.tobytes()) + turned.tobytes().hex().encode()
    for data in (
        encoded(image, exif=turned.tobytes()),
        png(PIXELS, 8, 2, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)),
        png(PIXELS, 8, 2, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(hexed))),
    ):
        np.testing.assert_array_equal(np.asarray(decode_image(data, RULES)), upright)


def test_whatever_pillow_writes_keeps_its_pixels():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat" * 300_000, zip=True)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = Image.fromarray(PIXELS).convert(mode)
        expected = image.convert("RGB")
        np.testing.assert_array_equal(
            np.asarray(decode_image(encoded(image, pnginfo=info), RULES)), np.asarray(expected)
        )


def test_a_text_or_a_profile_that_unpacks_to_much_takes_little_memory():
    bomb = zlib.compress(bytes(2**27), 1)
    texts = [chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iTXt", b"XML:com.adobe.xmp" + UTF8 + bomb)]
    data = png(PIXELS, 8, 2, *texts, chunk(b"iCCP", b"x\0\0" + bomb))
    tracemalloc.start()
    decode_image(data, RULES)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**25 + 2 * len(data)  # a profile has 16 MB at most, which zlib may double


def test_damage_anywhere_in_a_png_is_an_image_or_a_reject():
    rng = np.random.default_rng(1)
    icc = chunk(b"iCCP", b"x\0\0" + zlib.compress(profile(DISPLAY_P3)))
    good = png(PIXELS, 8, 2, TEXTS["a wrong checksum"], chunk(b"gAMA", bytes(4)), icc)
    for _ in range(300):
        data = bytearray(good)
        for place in rng.integers(8, len(data), 3):
            data[place] = rng.integers(256)
        try:
            assert decode_image(bytes(data[: rng.integers(8, len(data) + 1)]), RULES).mode == "RGB"
        except DataError:
            pass
