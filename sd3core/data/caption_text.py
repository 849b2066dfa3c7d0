"""Makes one clean line of the words that people write as an image's caption."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sd3core.recipe import Data
from sd3core.words import cut_at_word, one_line

BYTE_ORDER_MARKS = (  # the longer first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SNIFFED_BYTES = 4096  # bytes that tell UTF-16 without a mark
EAST_ASIAN = frozenset(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "IDEOGRAPHIC", "BOPOMOFO"))  # written together
SCRIPTS = 3  # of one caption from which on it is taken for several


def text_encoding(content: bytes) -> tuple[str, int]:
    """(encoding, length of its mark): UTF-8, UTF-16 or UTF-32 by the mark; UTF-16 also where half of every other byte is zero."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return encoding, len(mark)
    head = content[:SNIFFED_BYTES]
    zeros = (head[::2].count(0), head[1::2].count(0))
    if len(content) % 2 == 0 and min(zeros) == 0 and 0 < len(head) <= 4 * max(zeros):
        return ("utf-16-be" if zeros[0] else "utf-16-le"), 0
    return "utf-8", 0


def lines_of(text: str) -> list[str]:
    """A text's lines that show something, each clean."""
    return [line for line in map(one_line, text.splitlines()) if line]


class CleanCaptions(NamedTuple):
    """An image's captions as they are stored, and what was done to the words that they were made of."""

    captions: tuple[str, ...]  # distinct ones, each a clean line; the first counts first
    cut: bool = False  # one was longer than data.max_caption_chars
    lines: int = 1  # that were made one, the most of any


def clean_captions(texts: Iterable[str], data: Data) -> CleanCaptions:
    """Makes captions of what stands in a caption file, or in the caption fields of a row."""
    captions: dict[str, None] = {}
    cut, most = False, 0
    for text in texts:
        lines = lines_of(text)
        line = "".join(lines[:1]) if data.caption == "first_line" else one_line(text)
        caption = cut_at_word(line, data.max_caption_chars)
        cut, most = cut or caption != line, max(most, len(lines))
        captions |= {caption: None} if caption else {}
    return CleanCaptions(tuple(captions), cut, most)


def as_stored(captions: Sequence[str]) -> str | list[str]:
    """Captions as records have them: the one alone, "" for none, a list of several."""
    return [*captions] if len(captions) > 1 else "".join(captions)


def from_stored(stored: str | Sequence[str]) -> tuple[str, ...]:
    """Inverse of as_stored."""
    return tuple(filter(None, (stored,))) if isinstance(stored, str) else tuple(stored)


def mixes_languages(line: str) -> bool:
    """Whether it has letters of so many scripts that it may be one text in several languages."""
    if line.isascii():
        return False
    scripts = {unicodedata.name(c, "").partition(" ")[0] for c in set(line) if c.isalpha()}
    return len({"EAST ASIAN" if script in EAST_ASIAN else script for script in scripts}) >= SCRIPTS
