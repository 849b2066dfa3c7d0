"""Colours that a profile or a file's own numbers name come out as the formulas of their spaces say, within a level."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from colour_samples import (
    ADOBE_RGB,
    DISPLAY_P3,
    PROPHOTO,
    SRGB,
    chunk,
    cmyk_profile,
    encoded,
    in_srgb,
    lab_of_inks,
    lab_to_srgb,
    png,
    profile,
    srgb_levels,
    srgb_light,
)
from PIL import Image, ImageCms

from sd3core.data import colour
from sd3core.data.images import BARE_CMYK, CONVERTED, TRANSPARENT, UNKNOWN_COLOURS, PixelRules, read_picture

RULES = PixelRules(10**6)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
SMOOTH = np.stack(np.meshgrid(np.linspace(20, 235, 32), np.linspace(235, 20, 24)), -1)
SMOOTH = np.concatenate([SMOOTH, SMOOTH[..., :1] / 2 + 40], -1).astype(np.uint8)
SPACES = {
    "Display P3": (DISPLAY_P3, None),
    "Adobe RGB": (ADOBE_RGB, 2.2),
    "ProPhoto": (PROPHOTO, 1.8),
    "linear": (SRGB, 1.0),
}
KINDS = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}


def light(exponent):
    return srgb_light if exponent is None else lambda v: v**exponent


def shown(data: bytes) -> np.ndarray:
    return np.asarray(read_picture(data, RULES).image).astype(float)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPACES)
def test_profiles_in_every_format(kind, name):
    space, exponent = SPACES[name]
    image = Image.fromarray(PIXELS if kind in ("PNG", "TIFF", "WEBP") else SMOOTH)
    stored = shown(encoded(image, kind, **KINDS[kind]))  # after what the format loses
    picture = read_picture(encoded(image, kind, icc_profile=profile(space, exponent), **KINDS[kind]), RULES)
    expected = in_srgb(stored / 255, space, light(exponent))
    assert picture.notes == (CONVERTED,) and "icc_profile" not in picture.image.info
    assert np.abs(np.asarray(picture.image) - expected).max() < 1.1
    assert np.abs(stored - expected).max() > 9  # the profile says something


@pytest.mark.parametrize("name", ["sRGB by hand", "LittleCMS's sRGB"])
def test_a_profile_that_says_srgb_changes_no_pixel(name):
    made = (
        profile(SRGB) if name == "sRGB by hand" else ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    picture = read_picture(encoded(Image.fromarray(PIXELS), icc_profile=made), RULES)
    assert picture.notes == () and colour.is_srgb(made, "RGB")
    np.testing.assert_array_equal(np.asarray(picture.image), PIXELS)


def test_a_profile_is_judged_by_its_effect_and_not_by_its_name():
    assert b"sRGB" not in profile(SRGB) and colour.is_srgb(profile(SRGB), "RGB")
    named = profile(DISPLAY_P3).replace(bytes(48), b"sRGB IEC61966-2.1".ljust(48, b"\0"), 1)
    assert b"sRGB" in named and not colour.is_srgb(named, "RGB")


def test_a_transform_is_built_once_for_a_profile(monkeypatch):
    built = []
    original = colour._built
    monkeypatch.setattr(colour, "_built", lambda *args: built.append(args[1]) or original(*args))
    data = encoded(Image.fromarray(PIXELS), icc_profile=profile(ADOBE_RGB, 2.19))
    for _ in range(5):
        shown(data)
    assert 0 < len(built) <= 2  # the probe's and the one that is kept


@pytest.mark.parametrize("exponent", [1.0, 2.6])
@pytest.mark.parametrize("of", ["GRAY", "RGB"])
def test_grey_by_a_profile_of_grey_or_of_colours(exponent, of):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    made = profile(SRGB, exponent, kind=b"GRAY") if of == "GRAY" else profile(ADOBE_RGB, exponent)
    expected = srgb_levels((levels / 255) ** exponent)[..., None]
    for image in (Image.fromarray(levels), Image.merge("LA", [Image.fromarray(levels), Image.new("L", (16, 16), 255)])):
        assert np.abs(shown(encoded(image, icc_profile=made)) - expected).max() < 1.1


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (4, 2), (2, 3), (6, 4)])
def test_all_bits_of_16_are_used_where_8_are_too_few(colour_type, channels):
    """Dark linear light: the high bytes alone are off by up to 12 levels there."""
    values = np.concatenate([np.arange(0, 2048), RNG.integers(0, 65536, 2048)]).astype(np.uint16)
    samples = np.stack([RNG.permutation(values) for _ in range(channels)], -1).reshape(64, 64, channels)
    if channels in (2, 4):
        samples[..., -1] = 65535
    grey = channels < 3
    made = profile(SRGB, 1.0, kind=b"GRAY" if grey else b"RGB ")
    data = png(samples, 16, colour_type, chunk(b"iCCP", b"x\0\0" + zlib.compress(made)))
    stored = samples[..., : 1 if grey else 3] / 65535
    expected = srgb_levels(stored) if grey else in_srgb(stored, SRGB, lambda v: v)
    assert np.abs(shown(data) - expected).max() < 1.5
    high = (samples[..., : 1 if grey else 3] >> 8) / 255
    assert np.abs((srgb_levels(high) if grey else in_srgb(high, SRGB, lambda v: v)) - expected).max() > 8


def test_a_curve_that_is_nowhere_steep_needs_no_more_than_8_bits(monkeypatch):
    """ProPhoto's, as photographs of 16 bits have it: not interpolated, which would take eight times as long."""
    monkeypatch.setattr(colour, "_interpolated", lambda *args: pytest.fail("interpolated"))
    samples = RNG.integers(0, 60_000, (40, 30, 1)) * RNG.uniform(0.9, 1.09, (40, 30, 3))
    samples = samples.astype(np.uint16)
    data = png(samples, 16, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(profile(PROPHOTO, 1.8))))
    away = np.abs(shown(data) - in_srgb(samples / 65535, PROPHOTO, lambda v: v**1.8))
    assert away.max() < 2.6 and away.mean() < 1


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression, planes", [(None, "contig"), ("zlib", "contig"), (None, "separate")])
def test_tiffs_of_16_bits_and_a_profile(order, compression, planes):
    from io import BytesIO

    import tifffile

    samples = RNG.integers(0, 3000, (20, 24, 3)).astype(np.uint16)
    sink = BytesIO()
    stored = samples if planes == "contig" else np.ascontiguousarray(samples.transpose(2, 0, 1))
    tifffile.imwrite(
        sink, stored, photometric="rgb", planarconfig=planes, byteorder=order, compression=compression,
        iccprofile=profile(SRGB, 1.0),
    )  # fmt: skip
    assert np.abs(shown(sink.getvalue()) - srgb_levels(samples / 65535)).max() < 1.5


def test_transparent_parts_lie_under_colours_that_are_already_srgb():
    rgba = np.concatenate([PIXELS, RNG.integers(0, 256, (24, 32, 1), dtype=np.uint8)], -1)
    picture = read_picture(
        encoded(Image.fromarray(rgba), icc_profile=profile(DISPLAY_P3)), PixelRules(10**6, "#102030")
    )
    part = rgba[..., 3:] / 255
    expected = part * in_srgb(PIXELS / 255, DISPLAY_P3, srgb_light) + (1 - part) * (0x10, 0x20, 0x30)
    assert set(picture.notes) == {CONVERTED, TRANSPARENT}
    assert np.abs(np.asarray(picture.image) - expected).max() < 1.6


def test_a_palette_has_the_colours_of_its_profile():
    palette = Image.fromarray(PIXELS).quantize(16)
    stored = np.asarray(palette.convert("RGB")) / 255
    found = shown(encoded(palette, icc_profile=profile(DISPLAY_P3)))
    assert np.abs(found - in_srgb(stored, DISPLAY_P3, srgb_light)).max() < 1.1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_goes_through_its_profile(kind):
    """A JPEG by Pillow is marked as Adobe's, whose inks are stored inverted."""
    inks = np.stack(np.meshgrid(np.linspace(0, 255, 32), np.linspace(255, 0, 24)), -1)
    inks = np.concatenate([inks, np.full_like(inks[..., :1], 60), inks[..., :1] / 3], -1).astype(np.uint8)
    image = Image.fromarray(inks, "CMYK")
    options = KINDS[kind] if kind == "JPEG" else {}
    stored = np.asarray(Image.open(__import__("io").BytesIO(encoded(image, kind, **options)))).reshape(-1, 4) / 255
    picture = read_picture(encoded(image, kind, icc_profile=cmyk_profile(), **options), RULES)
    expected = lab_to_srgb(lab_of_inks(stored)).reshape(24, 32, 3)
    black = lab_to_srgb(np.zeros((1, 3)))
    assert picture.notes == (CONVERTED,) and black.max() < 1
    assert np.abs(np.asarray(picture.image) - expected).max() < 4  # the lattice of the profile is coarse
    bare = read_picture(encoded(image, kind, **options), RULES)
    assert bare.notes == (BARE_CMYK,) and np.abs(np.asarray(bare.image) - expected).max() > 20


BROKEN = {
    "not one": b"no profile at all",
    "cut": profile(DISPLAY_P3)[:200],
    "of grey": profile(SRGB, 1.0, kind=b"GRAY"),
    "of inks": cmyk_profile(),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("name", BROKEN)
def test_colours_of_a_profile_that_is_of_no_use_are_taken_as_srgb(kind, name):
    image = Image.fromarray(PIXELS)
    picture = read_picture(encoded(image, kind, icc_profile=BROKEN[name], **KINDS[kind]), RULES)
    assert picture.notes == (UNKNOWN_COLOURS,)
    np.testing.assert_array_equal(np.asarray(picture.image), shown(encoded(image, kind, **KINDS[kind])))


def test_a_jpeg_whose_profile_lacks_a_part_is_told():
    data = encoded(Image.fromarray(PIXELS), "JPEG", icc_profile=profile(DISPLAY_P3))
    assert read_picture(data.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"), RULES).notes == (UNKNOWN_COLOURS,)


def gama(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", value))


def chrm(space) -> bytes:
    red, green, blue, white = space
    return chunk(
        b"cHRM", struct.pack(">8I", *(round(v * 100_000) for place in (white, red, green, blue) for v in place))
    )


SRGB_CHUNK = chunk(b"sRGB", b"\0")
ICC_P3 = chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile(DISPLAY_P3)))
PNG_COLOURS = {  # chunks, and the space and curve they mean; None: as stored
    "no chunk": ((), None),
    "gAMA 1": ((gama(100_000),), (SRGB, 1.0)),
    "gAMA 1/1.8": ((gama(55_556),), (SRGB, 1.8)),
    "gAMA 1/2.2": ((gama(45_455),), None),
    "gAMA 1/2.22": ((gama(45_000),), None),
    "gAMA 1/2.2 with sRGB's cHRM": ((gama(45_455), chrm(SRGB)), None),
    "gAMA 1/2.2 with P3's cHRM": ((gama(45_455), chrm(DISPLAY_P3)), (DISPLAY_P3, None)),
    "gAMA 1 with P3's cHRM": ((gama(100_000), chrm(DISPLAY_P3)), (DISPLAY_P3, 1.0)),
    "cHRM alone": ((chrm(DISPLAY_P3),), None),
    "gAMA 0": ((gama(0),), None),
    "sRGB before gAMA": ((SRGB_CHUNK, gama(100_000), chrm(DISPLAY_P3)), None),
    "iCCP before gAMA": ((ICC_P3, gama(100_000)), (DISPLAY_P3, None)),
    "iCCP before sRGB": ((ICC_P3, SRGB_CHUNK), (DISPLAY_P3, None)),
    "cICP before iCCP": ((chunk(b"cICP", bytes([1, 13, 0, 1])), ICC_P3), None),
    "cICP of P3": ((chunk(b"cICP", bytes([12, 13, 0, 1])),), (DISPLAY_P3, None)),
    "cICP, linear": ((chunk(b"cICP", bytes([1, 8, 0, 1])),), (SRGB, 1.0)),
}


@pytest.mark.parametrize("name", PNG_COLOURS)
def test_chunks_of_colour_in_a_png(name):
    chunks, meant = PNG_COLOURS[name]
    picture = read_picture(png(PIXELS, 8, 2, *chunks), RULES)
    expected = PIXELS if meant is None else in_srgb(PIXELS / 255, meant[0], light(meant[1]))
    assert np.abs(np.asarray(picture.image) - expected).max() < (1.1 if meant else 0.1)
    assert picture.notes == ((CONVERTED,) if meant else ())


@pytest.mark.parametrize(
    "chunks",
    [
        (chunk(b"cICP", bytes([9, 16, 0, 1])),),  # BT.2020 with PQ
        (gama(100_000), chunk(b"cHRM", bytes(32))),
        (chunk(b"iCCP", b"x\0\0damaged"),),
        (chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**25))),),  # a bomb
    ],
)
def test_colours_that_cannot_be_told_are_taken_as_srgb_and_counted(chunks):
    picture = read_picture(png(PIXELS, 8, 2, *chunks), RULES)
    assert picture.notes == (UNKNOWN_COLOURS,)
    np.testing.assert_array_equal(np.asarray(picture.image), PIXELS)


def bmp(made: bytes) -> bytes:
    """PIXELS with a header of version 5 that carries a profile behind them. Rows of 96 bytes, the lowest first."""
    height, width, _ = PIXELS.shape
    pixels = PIXELS[::-1, :, ::-1].tobytes()
    info = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 24, 0, len(pixels), 0, 0, 0, 0).ljust(56, b"\0") + b"DEBM"
    info = info.ljust(112, b"\0") + struct.pack("<III", 124 + len(pixels), len(made), 0)
    return b"BM" + struct.pack("<IHHI", 138 + len(pixels) + len(made), 0, 0, 138) + info + pixels + made


def test_a_bmp_of_version_5_has_the_colours_of_its_profile():
    found = shown(bmp(profile(DISPLAY_P3)))
    assert np.abs(found - in_srgb(PIXELS / 255, DISPLAY_P3, srgb_light)).max() < 1.1
    for cut in (bmp(profile(DISPLAY_P3))[:-9], bmp(b"")):
        picture = read_picture(cut, RULES)
        assert picture.notes == (UNKNOWN_COLOURS,)
        np.testing.assert_array_equal(np.asarray(picture.image), PIXELS)


def test_an_avif_s_numbers_for_its_colours():
    """Pillow writes 1 and 13 (sRGB); the same file with 12 (P3) in the place of 1."""
    data = encoded(Image.fromarray(SMOOTH), "AVIF", **KINDS["AVIF"])
    box = b"colrnclx" + struct.pack(">HH", 1, 13)
    assert data.count(box) == 1
    stored = shown(data)
    for primaries, transfer, expected in ((12, 13, in_srgb(stored / 255, DISPLAY_P3, srgb_light)), (9, 16, stored)):
        picture = read_picture(data.replace(box, b"colrnclx" + struct.pack(">HH", primaries, transfer)), RULES)
        assert np.abs(np.asarray(picture.image) - expected).max() < 1.1
        assert picture.notes == ((CONVERTED,) if transfer == 13 else (UNKNOWN_COLOURS,))
