"""Text from outside: what is shown of it is one line that no terminal, Markdown reader or shell takes for its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata

import pytest

from sd3core.errors import DataError
from sd3core.shown_text import markdown_code, markdown_text, plain_text, printable, shell_word, shortened

EVERY_CHARACTER = "".join(map(chr, range(sys.maxunicode + 1)))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle", "a red circle"),
        ("ein grüner Kreis, 赤い円, दायरा, 𠮷野家, 😀", "ein grüner Kreis, 赤い円, दायरा, 𠮷野家, 😀"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),  # joiners belong to the words
        ("\x1b[31mred\x1b]0;title\x07", "\\x1b[31mred\\x1b]0;title\\x07"),
        ("a\nb\r\tc\x00", "a\\nb\\r\\tc\\x00"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("a\u2028b\u2029c\x85d\x9b", "a\\u2028b\\u2029c\\u0085d\\u009b"),
        ("\ufeffa\u200bb\u00ad", "\\ufeffa\\u200bb\\u00ad"),
        ("\udcff\udc9b", "\\xff\\x9b"),
        ("\ud800", "\\ud800"),
        ("hidden\U000e0041", "hidden\\udb40\\udc41"),
        ("C:\\new", "C:\\new"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_nothing_that_moves_a_cursor_or_turns_a_line_is_left_of_all_characters():
    shown = printable(EVERY_CHARACTER)
    left = {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"}
    assert not left & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(shown.splitlines()) == 1 and shown.encode()
    kept = [c for c in EVERY_CHARACTER if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert all(printable(c) == c for c in kept[::97])


def test_json_that_is_shown_stays_json():
    prompts = ["a\x1b\n", "\x7f\x9b", "\u202e", "flag \U0001f3f4\U000e0067\U000e007f"]
    shown = printable(json.dumps(prompts, ensure_ascii=False))
    assert json.loads(shown) == prompts and "\u202e" not in shown


def test_an_error_is_one_line_of_bounded_length():
    assert str(DataError("photos/\x1b[2J\n.jpg: damaged")) == "photos/\\x1b[2J\\n.jpg: damaged"
    assert len(str(DataError("x" * 10**6))) < 4_100


def test_shortened():
    assert shortened("x" * 10, 10) == "x" * 10
    assert shortened("a" * 50 + "b" * 50, 20) == "a" * 10 + "... (80 more characters) ..." + "b" * 10


@pytest.mark.parametrize(
    "text", ["| a | b |", "`code`", "<script>alert(1)</script>", "![x](http://127.0.0.1/x.png)", "[x](javascript:y)", "**b** _i_ ~~s~~", "&lt;", "a\n# b", "\\|", "a_b_c"]
)  # fmt: skip
def test_markdown_shows_the_text_and_nothing_else(text):
    """Against an independent reader: the rendered cell and paragraph hold the text, without an element of their own."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("gfm-like", {"linkify": False})
    table = f"| head |\n| --- |\n| {markdown_text(text)} |"
    for document, wrapped in ((table, "tbody"), (f"x {markdown_text(text)}", "p")):
        tokens = reader.parse(document)
        inline = [token for token in tokens if token.type == "inline"][-1]
        assert {child.type for child in inline.children} <= {"text", "text_special"}, inline
        assert "".join(child.content for child in inline.children).removeprefix("x ") == printable(text)
        assert len([token for token in tokens if token.type == "td_open"]) == (1 if wrapped == "tbody" else 0)
    code = reader.parse(f"x {markdown_code(text)} y")[1].children
    assert [child.type for child in code] == ["text", "code_inline", "text"] and code[1].content == printable(text)


@pytest.mark.parametrize(
    "word",
    ["plain", "two words", "it's", "$(id)", "a\\b", "é😀𠮷", "\x1b[2J", "a\nb'c\\", "\u202e", "\udcff", "%20#?", ""],
)
def test_a_shell_reads_the_word_again(word):
    shown = shell_word(word)
    assert printable(shown) == shown
    script = f"printf %s {shown}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, check=True, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    assert done.stdout == os.fsencode(word)


def test_plain_text_is_what_markdown_was_made_of():
    text = "a [b](c) *d* _e_ | `f` <g> \\ #1. 2) 100 % -- ~~h~~ ![i]"
    assert plain_text(markdown_text(text)) == text != markdown_text(text)
