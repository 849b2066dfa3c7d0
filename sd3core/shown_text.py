"""Shows text from outside without harm: in terminals, Markdown, commands.

Such text is file names, captions, recipe keys.

A control character could move the cursor or recolour the screen, a mark of direction could reorder a line, a line break could fake a
second one. They are shown as a programming language writes them: `\x1b`, `\u202e`, `\n`.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata

JOINERS = "\u200c\u200d"  # within emoji and words of several scripts; they neither move nor hide anything
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's categories: control, format, surrogates, line and paragraph breaks
# what begins something; an underscore only beside a word does
MARKDOWN = re.compile(r"[\\`*~|&<>\[\]]|(?<!\w)_|_(?!\w)")


def printable(text: str) -> str:
    """The text in one line, with what must not reach a terminal escaped. Any script stays as it is; so does a backslash.

    A byte of a file name that is no UTF-8 (Python holds it as a surrogate) is shown as that byte, `\\xff`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in UNSHOWN and c not in JOINERS else c for c in text)


def is_utf8(text: str) -> bool:
    """False of a name with bytes that are no UTF-8: Python holds them as surrogates, and neither JSON nor YAML can carry those."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character < "\x7f":
        return repr(character)[1:-1]
    units = character.encode("utf-16-be", "surrogatepass").hex()  # as in JSON, so that JSON that is shown stays JSON
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def shortened(text: str, most: int) -> str:
    """Shortens a text to about so many characters: the middle is left out, and how much."""
    if len(text) <= most:
        return text
    kept = most // 2
    return f"{text[:kept]}... ({len(text) - 2 * kept:,} more characters) ...{text[-kept:]}"


def markdown_text(text: str) -> str:
    """The text as Markdown that shows it, in a paragraph, a list or a cell of a table: no picture, link, HTML or column of its own."""
    return MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))


def plain_text(markdown: str) -> str:
    """What `markdown_text` made its argument of."""
    return re.sub(r"\\(.)", r"\1", markdown)


def markdown_code(text: str) -> str:
    """The text as a code span of Markdown, whose fence is longer than any run of backticks in it."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if "`" in shown else f"{fence}{shown}{fence}"


def shell_word(text: str) -> str:
    """One word of a command to paste: quoted where a shell would read it otherwise, escaped where a terminal would."""
    if printable(text) == text:
        return shlex.quote(text)
    escaped = (chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in os.fsencode(text))
    return f"$'{''.join(escaped)}'"
