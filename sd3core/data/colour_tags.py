"""Reads what an image file says of its colours beside its pixels.

It also takes from a PNG the chunks that no picture needs.

PNG, third edition: cICP before iCCP before sRGB before gAMA with cHRM (section 4.3); tRNS in the file's own bits (11.3.1).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from sd3core.data.colour import Chromaticities, coded_profile, gamma_profile

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
UNUSABLE = b""  # in the place of a profile that cannot be read
MAX_PROFILE_BYTES = 2**24  # a printer's has some megabytes
MAX_TEXT_BYTES = 2**20
BMP_V5, EMBEDDED = 124, b"DEBM"  # the header's length, and its colour space PROFILE_EMBEDDED
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
TURNED_BY = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")  # texts that may hold an orientation
GREY, RGB, GREY_WITH_ALPHA = 0, 2, 4  # colour types of PNG; tRNS gives the first two one transparent colour


@dataclass
class Png:
    """`pixels` is the file without texts and other chunks that no decoder of pixels needs, however large they are."""

    pixels: bytes = b""
    bits: int = 8
    colour_type: int = RGB
    transparent: tuple[int, ...] | None = None  # the colour that is, in the file's own bits
    chunks: dict[bytes, bytes] = field(default_factory=dict)  # of colours

    def profile(self) -> bytes | None:
        """An ICC profile, UNUSABLE, or None: sRGB. Raises UnusableProfile for coded colours that sRGB has not."""
        if len(coded := self.chunks.get(b"cICP", b"")) == 4:
            return coded_profile(coded[0], coded[1])
        if b"iCCP" in self.chunks:
            return _unpacked(self.chunks[b"iCCP"])
        if b"sRGB" in self.chunks or len(self.chunks.get(b"gAMA", b"")) != 4:
            return None
        gamma = int.from_bytes(self.chunks[b"gAMA"], "big") / 100_000
        return gamma_profile(gamma, _chromaticities(self.chunks.get(b"cHRM", b"")))


def read_png(data: bytes) -> Png:
    """Takes a PNG apart. What is damaged is left for the decoder to find, except in chunks that it does not need."""
    png, kept, texts = Png(), [PNG_MAGIC], set()
    view = memoryview(data)
    for kind, start, end in _chunks(data):
        chunk = view[start:end]
        needed = kind[:1].isupper() or kind in ANIMATION
        if not needed and not _is_whole(chunk):
            continue
        body = chunk[8:-4]
        if kind == b"IHDR" and len(body) >= 10:
            png.bits, png.colour_type = body[8], body[9]
        if kind == b"tRNS" and png.colour_type in (GREY, RGB):
            png.transparent = _samples(bytes(body), 1 if png.colour_type == GREY else 3)
        elif kind in (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"):
            png.chunks.setdefault(kind, bytes(body))
        elif needed or kind in (b"tRNS", b"eXIf"):
            kept.append(chunk)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = bytes(body[:80]).partition(b"\0")[0]
            if key in TURNED_BY and key not in texts and _is_small(kind, bytes(body)):
                texts.add(key)
                kept.append(chunk)
    png.pixels = b"".join(kept)
    return png


def avif_profile(data: bytes) -> bytes | None:
    """The profile of the colours that an AVIF codes by numbers (colr, nclx), for one without an ICC profile.

    Raises UnusableProfile for colours that sRGB has not.
    """
    box: memoryview = memoryview(data)
    for name, skipped in ((b"meta", 4), (b"iprp", 0), (b"ipco", 0)):
        box = next((body[skipped:] for kind, body in _boxes(box) if kind == name), memoryview(b""))
    for kind, body in _boxes(box):
        if kind == b"colr" and body[:4] == b"nclx" and len(body) >= 8:
            return coded_profile(*struct.unpack(">HH", body[4:8]))
    return None


def bmp_profile(data: bytes) -> bytes | None:
    """The ICC profile that a BMP of version 5 carries, UNUSABLE where it is cut short, None where there is none."""
    size, space, start, length = (data[14 + place : 18 + place] for place in (0, 56, 112, 116))
    if int.from_bytes(size, "little") != BMP_V5 or space != EMBEDDED:
        return None
    start, length = (int.from_bytes(number, "little") for number in (start, length))
    profile = data[14 + start : 14 + start + length]
    return profile if len(profile) == length else UNUSABLE


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of each chunk, length and checksum included; the last may be cut short."""
    place = len(PNG_MAGIC)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = min(place + 12 + length, len(data))
        yield kind, place, end
        if kind == b"IEND":
            return
        place = end


def _is_whole(chunk: memoryview) -> bool:
    length, checksum = int.from_bytes(chunk[:4], "big"), int.from_bytes(chunk[-4:], "big")
    return len(chunk) == length + 12 and zlib.crc32(chunk[4:-4]) == checksum


def _samples(body: bytes, count: int) -> tuple[int, ...] | None:
    return struct.unpack(f">{count}H", body) if len(body) == 2 * count else None


def _chromaticities(body: bytes) -> Chromaticities | None:
    if len(body) != 32:
        return None
    values = [value / 100_000 for value in struct.unpack(">8I", body)]
    return tuple(zip(values[::2], values[1::2], strict=True))


def _unpacked(body: bytes) -> bytes:
    """iCCP: a name, a null, a null for the method, and the profile."""
    return _inflated(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES) or UNUSABLE


def _is_small(kind: bytes, body: bytes) -> bool:
    """Whether the decoder may unpack this text."""
    rest = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(body) <= MAX_TEXT_BYTES
    packed = rest[1:] if kind == b"zTXt" else rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    return _inflated(packed, MAX_TEXT_BYTES) is not None


def _inflated(packed: bytes, at_most: int) -> bytes | None:
    """None where it is damaged or would be larger."""
    inflate = zlib.decompressobj()
    try:
        plain = inflate.decompress(packed, at_most)
    except zlib.error:
        return None
    return None if inflate.unconsumed_tail else plain


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of each box of an ISO base media file."""
    place = 0
    while place + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        header = 8
        if size == 1 and place + 16 <= len(data):
            size, header = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        elif size == 0:
            size = len(data) - place
        if size < header:
            return
        yield kind, data[place + header : place + size]
        place += size
