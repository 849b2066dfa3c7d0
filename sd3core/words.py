"""Words for counts, durations and lists, and captions in one line."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

NAMED = 3  # of many things that a line is about
GB, MB = 1e9, 1e6  # bytes
DAY_S = 24 * 3600


def format_seconds(seconds: float) -> str:
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {secs:02d} s" if minutes else f"{secs} s"


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def some(names: Sequence[str], count: int) -> str:
    """The first of `count` names, and how many more there are."""
    shown = names[:NAMED]
    return ", ".join(shown) + (f" and {count - len(shown):,} more" if count > len(shown) else "")


def one_line(text: str) -> str:
    """A caption without control characters or line breaks. Any script.

    Characters that show nothing (joiners, marks of direction) stay beside those that do; alone they are no caption.
    """
    kept = "".join(
        " " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs")
    )
    line = " ".join(kept.split())
    return line if any(unicodedata.category(c)[0] in "LMNPS" for c in line) else ""


def cut_at_word(line: str, max_chars: int) -> str:
    """Cuts the line to at most so many characters: whole words, where it has spaces."""
    if len(line) <= max_chars:
        return line
    cut = line[:max_chars]
    if line[max_chars] != " " and " " in cut:
        cut = cut[: cut.rindex(" ")]
    return cut.rstrip()
