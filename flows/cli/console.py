"""Where the commands print: text is text, whatever stands in it."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from sd3core.shown_text import printable


class PlainConsole(Console):
    """A console that shows names and captions from outside as they are, and in one line: neither control characters, which would
    reach the terminal, nor [markup] or :emoji: of rich's have a meaning in them. Also in the cells of tables.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


LOG_WIDTH = 160
console = PlainConsole(width=None if sys.stdout.isatty() else LOG_WIDTH)  # tables in logs and pipes keep their columns


def say(line: str) -> None:
    """One line of the command's own, whole: a terminal that is narrower wraps it."""
    console.print(line, soft_wrap=True, highlight=False)
