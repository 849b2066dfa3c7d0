"""Reads a tar from front to back: samples of neighbours that share a key.

The archive is not trusted: names are words, never paths; what a header claims is compared with the file's size; only plain files
are members. What of it can be read is read, and a damage is told with its place.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sd3core.errors import DataError

if TYPE_CHECKING:
    from sd3core.data.sources.ranged_file import RangedFile

BLOCK = tarfile.BLOCKSIZE
ZEROS_AT_ONCE = 1 << 20
LONGEST_HEADER = 1 << 20  # bytes of an extended header: names and times take a few hundred
PLAIN_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
COMPRESSED_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class TarMember:
    """A plain file. `offset`: where its bytes begin."""

    name: str
    offset: int
    size: int


@dataclass
class TarSample:
    """Neighbours whose names agree up to the first dot of the last part. `members`: by what stands behind that dot."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    is_cut: bool = False  # the archive ends or is damaged in it, or right behind it


class TarDamaged(DataError):
    """A tar that ends too early or holds what is no header. `place`: the first byte that is no use."""

    def __init__(self, what: str, place: int) -> None:
        super().__init__(what)
        self.place = place


class TarReader:
    """The samples of one tar. When they are through, `damage` says where it ends too early, or that there is more behind its end,
    and `is_marked` whether its end mark stands there.
    """

    def __init__(self, file: RangedFile) -> None:
        self.file = file
        self.damage: TarDamaged | None = None
        self.is_marked = False

    def samples(self) -> Iterator[TarSample]:
        sample: TarSample | None = None
        usual = None  # members of the sample before
        try:
            for member in self._members():
                key, extension = _key_and_extension(member.name)
                if not key:
                    continue
                if sample is None or key != sample.key or extension in sample.members:
                    if sample is not None:
                        yield sample
                        usual = sample.members.keys()
                    sample = TarSample(key)
                sample.members[extension] = member
                if member.offset + member.size > self.file.size:
                    raise TarDamaged("cut short", member.offset)
        except TarDamaged as damage:
            self.damage = damage
            if sample is not None:
                sample.is_cut = True
        if sample is not None:
            if not self.is_marked and usual is not None:
                # Without an end mark it may be a tar that was cut between two members of this sample.
                sample.is_cut |= sample.members.keys() != usual
            yield sample

    def _members(self) -> Iterator[TarMember]:
        """Names may come in a header of their own before the file's."""
        place, long_name, size = 0, "", -1
        while place < self.file.size:
            self.file.seek(place)
            header = self._header(place)
            if header is None:
                self.is_marked = True
                if self._goes_on():  # as of tars put behind each other, of which any reader takes the first
                    self.damage = TarDamaged("ended by a mark with more behind it", place)
                return
            start, place = place + BLOCK, place + BLOCK + -(-header.size // BLOCK) * BLOCK
            if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                fields = _pax_fields(self._extension(header, start), start)
                long_name = fields.get("path", long_name)
                size = _number(fields["size"], start) if "size" in fields else size
            elif header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text(self._extension(header, start).split(b"\0")[0])
            elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
                if size >= 0:  # too large for the plain header
                    header.size, place = size, start + -(-size // BLOCK) * BLOCK
                if header.type in PLAIN_TYPES:
                    yield TarMember(long_name or header.name, start, header.size)
                long_name, size = "", -1
        if place > self.file.size:
            raise TarDamaged("cut short", self.file.size)

    def _goes_on(self) -> bool:
        """Whether the rest of the file is more than the zeros that fill it up."""
        while block := self.file.read(ZEROS_AT_ONCE):
            if block.count(0) < len(block):
                return True
        return False

    def _header(self, place: int) -> tarfile.TarInfo | None:
        """None at the end mark."""
        block = self.file.read(BLOCK)
        if place == 0 and (kind := next((k for m, k in COMPRESSED_MAGIC.items() if block.startswith(m)), "")):
            raise TarDamaged(f"compressed ({kind}), which is not read: unpack it", 0)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:
            return None
        except tarfile.TruncatedHeaderError:
            raise TarDamaged("cut short", place) from None
        except (tarfile.HeaderError, ValueError):
            raise TarDamaged("no tar" if place == 0 else "damaged", place) from None
        if header.size < 0:
            raise TarDamaged("damaged", place)
        return header

    def _extension(self, header: tarfile.TarInfo, start: int) -> bytes:
        if header.size > LONGEST_HEADER:
            raise TarDamaged("damaged", start)
        data = self.file.read(header.size)
        if len(data) < header.size:
            raise TarDamaged("cut short", start)
        return data


def _key_and_extension(name: str) -> tuple[str, str]:
    """("", "") of what is no sample's: what network drives and archivers of a Mac put beside each file."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or "__MACOSX" in folder.split("/"):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _pax_fields(data: bytes, place: int) -> dict[str, str]:
    """Records of the form "LENGTH KEY=VALUE\\n"."""
    fields = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = _number(_text(digits), place)
        record = data[len(digits) + 1 : length]
        if not space or not record.endswith(b"\n") or b"=" not in record:
            raise TarDamaged("damaged", place)
        key, _, value = record[:-1].partition(b"=")
        fields[_text(key)] = _text(value)
        data = data[length:]
    return fields


def _number(text: str, place: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise TarDamaged("damaged", place)
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
