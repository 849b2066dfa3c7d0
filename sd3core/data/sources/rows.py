"""A row of a source file: an image's bytes, its captions, why it is not taken.

A row's key is made of its file's name and its own, so that 00001.jpg of two tars are two images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sd3core.data.caption_text import clean_captions
from sd3core.data.folder_source import storable
from sd3core.recipe import Data
from sd3core.shown_text import printable, shortened

LONGEST_TEXT = 4 << 20  # bytes of a member that holds words
BYTES_A_PIXEL = 8  # four colours of 16 bits: no image of data.max_image_pixels has many more
SHOWN_CHARS = 60  # of a status, of which there should be few
SHOWN_KEY_CHARS = 60
IS_CUT = "its file ends or is damaged in it"
# img2dataset's status of a row that has an image, and how those of others begin
SUCCESS, FAILED = "success", "failed"


class RowNote(StrEnum):
    """What a person should know of rows or of a whole file: counted, with the first names."""

    CUT = "cut"
    LONG = "long"
    SEVERAL_IMAGES = "several images"
    BROKEN_JSON = "broken json"
    WITHOUT = "without"
    DAMAGED = "damaged"
    UNMARKED = "unmarked"
    NO_TABLE = "no table"


@dataclass(frozen=True)
class SourceRow:
    """`name`: of the row in its file."""

    name: str
    image: bytes = b""
    captions: tuple[str, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    may_pass: bool = False  # the problem: it is of the right to read or of what is not there now, not of the bytes


@dataclass(frozen=True)
class RowRules:
    """What of a recipe decides what becomes of a row."""

    data: Data
    captions_needed: bool  # an image without caption is rejected, because no captioner will write one

    @property
    def most_bytes(self) -> int:
        """Of an image file."""
        return BYTES_A_PIXEL * self.data.max_image_pixels + (16 << 20)

    def too_large(self, size: int) -> str:
        return f"a file of more than {self.most_bytes // 1_000_000:,} MB" if size > self.most_bytes else ""

    def row(
        self, name: str, image: bytes, texts: Sequence[str], where: Sequence[str], notes: Iterable[str] = ()
    ) -> SourceRow:
        """`texts`: its captions as they stand. `where`: they were looked for."""
        kept, cut, lines = clean_captions(texts, self.data)
        told = {RowNote.CUT: cut, RowNote.LONG: lines > 1 and self.data.caption == "whole", RowNote.WITHOUT: not kept}
        found = {*notes, *(note for note, holds in told.items() if holds)}
        problem = no_caption(where) if self.captions_needed and not kept else ""
        return SourceRow(name, image, kept, problem, tuple(sorted(found)))


def no_caption(where: Sequence[str]) -> str:
    return (
        f"no caption in {', '.join(where)} (name its place in data.caption_fields, or a captioner in caption.captioner)"
    )


def status_problem(status: object) -> str:
    """What img2dataset says of a row that has no image, as "failed_to_download"; "" of one that has.

    Other data have a status, too, and an image beside it: what is no failure's says nothing of that.
    """
    if not isinstance(status, str) or not status.startswith(FAILED):
        return ""
    return f"status {shortened(printable(storable(status)), SHOWN_CHARS)}"


def row_key(unit: str, name: str, occurrence: int) -> str:
    """Safe in a tar, without dots, and a row's own in the whole source."""
    said = json.dumps([unit, name, occurrence]).encode()
    shown = re.sub(r"[^A-Za-z0-9_-]", "_", name.rpartition("/")[2])[:SHOWN_KEY_CHARS]
    return f"{shown}-{hashlib.sha256(said).hexdigest()[:16]}"
