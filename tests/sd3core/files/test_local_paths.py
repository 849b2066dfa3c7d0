"""Paths and file:// URLs: whatever stands in a name, a store lies where it is told to, and what is shown of it can be opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd3core.data.store import open_store
from sd3core.errors import StoreError, UserError
from sd3core.files.local_paths import expanded, path_of_url, shown_place

NAMES = [
    "plain",
    "a b",
    "a%20b",
    "100%",
    "%zz",
    "#",
    "a?b=c",
    "é",
    "😀",
    "𠮷野家",
    "line\nbreak",
    "\x1b[2J",
    "\u202e",
    "a:b",
    "~x",
    "\\",
    "'\"",
    os.fsdecode(b"\xff\xfe"),
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_store_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "store"
    store = open_store(str(folder))
    store.put("runs/x/a.json", b"1")
    assert (folder / "runs" / "x" / "a.json").read_bytes() == b"1"
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert store.url == folder.as_uri() and store.url.isascii() and store.url.isprintable()
    again = open_store(store.url)
    assert again.root == folder and again.get("runs/x/a.json") == b"1" and again.url == store.url
    inside = open_store(store.uri("runs/x"))  # a URL and a path, joined and opened again
    assert inside.get("a.json") == b"1"
    assert shown_place(store.uri("runs/x/a.json")) == str(folder / "runs" / "x" / "a.json")
    assert Path(shown_place(store.uri("runs/x/a.json"))).read_bytes() == b"1"


def test_urls_of_before_open_what_they_did(tmp_path):
    """A file:// URL that a user writes with plain spaces and letters is taken as it stands; %XX is one byte."""
    open_store(str(tmp_path / "my störe")).put("x", b"1")
    for url in (f"file://{tmp_path}/my störe", f"file://{tmp_path}/my%20st%C3%B6re"):
        assert open_store(url).get("x") == b"1"
    assert path_of_url("file:///100%/x") == Path("/100%/x")
    assert shown_place("s3://bucket/a%20b") == "s3://bucket/a%20b"


@pytest.mark.parametrize("text", ["", "a\0b", "~nobody-of-that-name/x"])
def test_what_can_be_no_path_is_told(text):
    with pytest.raises(UserError):
        expanded(text)
    with pytest.raises((UserError, StoreError)):
        open_store(text)
