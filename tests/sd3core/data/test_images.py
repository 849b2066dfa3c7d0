"""decode_image shows what a viewer shows or says in a few words why not; crop_to covers the bucket from the centre."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from sd3core.data.images import Crop, PixelRules, crop_to, decode_image, read_picture, to_model_range
from sd3core.errors import DataError

RULES = PixelRules(10_000)


def _encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _gradient(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // max(1, height - 1), x * 255 // max(1, width - 1), np.full_like(x, 80)], -1).astype(
        np.uint8
    )


@pytest.mark.parametrize(
    "kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]
)
def test_lossless_formats_give_their_pixels(kind, options):
    pixels = _gradient(20, 30)
    picture = read_picture(_encoded(Image.fromarray(pixels), kind, **options), RULES)
    assert picture.format == kind and picture.notes == ()
    np.testing.assert_array_equal(np.asarray(picture.image), pixels)


@pytest.mark.parametrize(
    "orientation, turn",
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (2, lambda a: a[:, ::-1])],
)
def test_exif_orientation_is_applied(orientation, turn):
    pixels = _gradient(20, 30)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(_encoded(Image.fromarray(pixels), exif=exif.tobytes()), RULES)
    np.testing.assert_array_equal(np.asarray(image), turn(pixels))


def test_damaged_exif_shows_the_image_as_it_is_stored():
    pixels = _gradient(20, 30)
    image = decode_image(
        _encoded(Image.fromarray(pixels), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff" + b"\x00\x01" * 9), RULES
    )
    np.testing.assert_array_equal(np.asarray(image), pixels)


def test_transparency_lies_over_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:2, :, 3] = 255
    image = np.asarray(decode_image(_encoded(Image.fromarray(rgba)), RULES))
    assert (image[:2] == (200, 0, 0)).all() and (image[2:] == 255).all()


def test_transparent_palette_index_lies_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    image = np.asarray(decode_image(_encoded(palette, transparency=0), RULES))
    assert image[0, 0].tolist() == [255, 255, 255] and image[0, 1].tolist() == [40, 50, 60]


def test_grey_one_bit_lab_and_cmyk_become_rgb():
    assert np.asarray(decode_image(_encoded(Image.new("L", (3, 3), 77)), RULES)).tolist() == [[[77] * 3] * 3] * 3
    assert np.asarray(decode_image(_encoded(Image.new("1", (3, 3), 1)), RULES)).min() == 255
    assert np.asarray(decode_image(_encoded(Image.new("LAB", (1, 1), (128, 128, 128)), "TIFF"), RULES)).tolist() == [
        [[119] * 3]
    ]
    red = decode_image(_encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), RULES)
    assert red.mode == "RGB" and np.abs(np.asarray(red).astype(int) - (255, 0, 0)).max() < 12


def test_sixteen_bits_keep_their_high_byte():
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    image = np.asarray(decode_image(_encoded(Image.fromarray(values)), RULES))
    np.testing.assert_array_equal(image[..., 0], values >> 8)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_a_channel(channels):
    """Pillow writes none, so the file is put together here: IHDR, one filterless row each, IEND."""
    values = np.arange(2 * 3 * channels, dtype=np.uint16).reshape(2, 3, channels) * 2500
    values[..., 3:] = 65535

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 3, 2, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(decode_image(data, RULES)), values[..., :3] >> 8)


def test_phone_jpeg_with_a_second_picture_behind_it_is_a_jpeg():
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("green", "blue"))
    picture = read_picture(_encoded(first, "MPO", save_all=True, append_images=[second]), RULES)
    assert picture.format == "JPEG" and np.abs(np.asarray(picture.image).astype(int) - (0, 128, 0)).max() < 8


def _bomb() -> bytes:
    data = bytearray(_encoded(Image.new("1", (8, 8))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # the header says 3.6 billion pixels
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


ANIMATED = "animated, or several pictures in one file; save the one you want as a file of its own"
NOISE = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
REJECTED = {
    "empty": (b"", "empty file"),
    "text": (b"not an image", "not an image that can be read (save it as JPEG or PNG)"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read (save it as JPEG or PNG)"),
    "eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not an image that can be read (save it as JPEG or PNG)",
    ),
    "truncated_png": (_encoded(Image.fromarray(NOISE))[:4000], "truncated or damaged image"),
    "truncated_jpeg": (_encoded(Image.fromarray(NOISE), "JPEG")[:900], "truncated or damaged image"),
    "too_large": (_encoded(Image.new("L", (101, 100))), "more than 10,000 pixels (data.max_image_pixels)"),
    "bomb": (_bomb(), "more than 10,000 pixels (data.max_image_pixels)"),
    "float": (
        _encoded(Image.new("F", (4, 4)), "TIFF"),
        "32-bit pixels, whose range is not known; save it with 8 or 16 bits",
    ),
    "gif": (
        _encoded(Image.new("L", (4, 4)), "GIF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]),
        ANIMATED,
    ),
    "webp": (
        _encoded(Image.new("RGB", (4, 4)), "WEBP", save_all=True, append_images=[Image.new("RGB", (4, 4), "red")]),
        ANIMATED,
    ),
    "apng": (_encoded(Image.new("L", (4, 4)), save_all=True, append_images=[Image.new("L", (4, 4), 9)]), ANIMATED),
    "pages": (
        _encoded(Image.new("L", (4, 4)), "TIFF", save_all=True, append_images=[Image.new("L", (4, 4), 9)]),
        ANIMATED,
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_a_short_reason(name):
    data, reason = REJECTED[name]
    with pytest.raises(DataError) as error:
        decode_image(data, RULES)
    assert str(error.value) == reason


def test_any_damage_is_a_data_error_or_an_image():
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        good = _encoded(Image.fromarray(NOISE), kind)
        for _ in range(40):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(256)
            try:
                assert decode_image(bytes(data), RULES).mode == "RGB"
            except DataError:
                pass


@pytest.mark.parametrize(
    "size, bucket",
    [((40, 40), (40, 40)), ((90, 60), (32, 32)), ((60, 90), (48, 32)), ((20, 31), (64, 48)), ((50, 200), (32, 64))],
)
def test_crop_is_resize_to_cover_then_centre(size, bucket):
    image = Image.fromarray(_gradient(*size))
    pixels, crop = crop_to(image, *bucket)
    assert pixels.shape == (*bucket, 3) and pixels.dtype == np.uint8
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = image.resize(
        (max(bucket[1], round(size[1] * scale)), max(bucket[0], round(size[0] * scale))), Image.Resampling.LANCZOS
    )
    assert (crop.top, crop.left) == ((resized.height - bucket[0]) // 2, (resized.width - bucket[1]) // 2)
    assert (crop.height, crop.width) == bucket
    expected = np.asarray(resized)[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    # at the cut, where resize sees what lies outside
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 4


def test_an_image_of_the_bucket_s_size_is_not_touched():
    image = Image.fromarray(NOISE)
    pixels, crop = crop_to(image, 60, 60)
    np.testing.assert_array_equal(pixels, NOISE)
    assert crop == Crop(0, 0, 60, 60)


def test_model_range():
    images = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3).repeat(2, axis=2)
    tensor = to_model_range(images)
    assert tensor.shape == (1, 3, 1, 2) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    torch.testing.assert_close(tensor[0, :, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))
