"""Makes one clean line of the words that people write as an image's caption."""

from __future__ import annotations

import codecs
import unicodedata

from sd3core.words import one_line

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


def mixes_languages(line: str) -> bool:
    """Whether it has letters of so many scripts that it may be one text in several languages."""
    if line.isascii():
        return False
    scripts = {unicodedata.name(c, "").partition(" ")[0] for c in set(line) if c.isalpha()}
    return len({"EAST ASIAN" if script in EAST_ASIAN else script for script in scripts}) >= SCRIPTS
