"""`sd3 inspect` says what any stored object holds, and draws its pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.files.local_paths import shown_place
from sd3core.files.whole_output import atomic_replacement
from sd3core.inspection import Findings, ShownRow, inspect_stored
from sd3core.inspection.contact_sheet import contact_sheet
from sd3core.pictures import encode_png
from sd3core.specs import TOWERS, named_towers
from sd3core.towers.artifact import fetch_towers, read_towers
from workers.caches import towers_cache

if TYPE_CHECKING:
    from sd3core.towers.autoencoder import Autoencoder

STORE_OF_LATENTS = re.compile(r"^(.+)/datasets/[^/]+/latents/[^/]+/?$")  # of a folder of latents
WORDS_OF = ("caption", "text", "txt", "bucket")  # what stands below a picture: the first of these that a row has


def print_inspection(url: str, rows: int, sheet: Path | None, console: Console) -> None:
    """Raises UserError where nothing stands at `url`, or `sheet` cannot be written."""
    found = inspect_stored(url, rows, vae_of_store)
    console.print(f"{shown_place(url)}: {found.title}", soft_wrap=True, highlight=False)
    for name, value in found.facts.items():
        console.print(f"  {name}: {value}", soft_wrap=True, highlight=False)
    for heading, lines in found.tables.items():
        console.print(f"{heading}:", highlight=False)
        _print_table(lines, console)
    if found.rows:
        console.print("first rows:", highlight=False)
        _print_table([_words(number, row) for number, row in enumerate(found.rows, start=1)], console)
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    numbered = enumerate(found.rows, start=1)  # as in the table
    if pictures := [(number, row) for number, row in numbered if isinstance(row.picture, np.ndarray)]:
        path = _write_sheet(found, pictures, sheet or Path(f"{_name_of(url)}.png"))
        console.print(f"sheet  {path}", soft_wrap=True, highlight=False)


def vae_of_store(folder_url: str, digest: str) -> Autoencoder | None:
    """The autoencoder with this digest, from towers in the store that the latents' folder lies in; None where there is none."""
    named = STORE_OF_LATENTS.match(folder_url)
    if not named:
        return None
    store = open_store(named[1])
    for name in store.folders(TOWERS):
        for spec in store.folders(named_towers(name)):
            folder = named_towers(name, spec)
            try:
                found = read_towers(store, folder).digests.get("vae") == digest
            except DataError:  # not finished, or of another version
                continue
            if found:
                from sd3core.towers.autoencoder import load_autoencoder  # loads diffusers

                return load_autoencoder(fetch_towers(store, folder, towers_cache(), only=("vae",)))
    return None


def _words(number: int, row: ShownRow) -> dict[str, str]:
    said = {"picture": row.picture} if isinstance(row.picture, str) and row.picture else {}
    return {"": f"{number}.", "key": row.key} | row.words | said


def _print_table(lines: list[dict[str, str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    columns = list(dict.fromkeys(name for line in lines for name in line))
    for name in columns:
        table.add_column(name, justify="right" if name in ("rows", "bytes", "") else "left", overflow="fold")
    for line in lines:
        table.add_row(*(line.get(name, "") for name in columns))
    console.print(table)


def _write_sheet(found: Findings, rows: list[tuple[int, ShownRow]], path: Path) -> Path:
    said = lambda row: next((row.words[name] for name in WORDS_OF if row.words.get(name)), row.key)
    picture = contact_sheet([(number, row.picture, said(row)) for number, row in rows])
    with atomic_replacement(path) as file:
        file.write(encode_png(picture, {"of": found.title}))
    return path


def _name_of(url: str) -> str:
    """A file's name for the sheet: the last two parts of the URL."""
    parts = re.sub(r"[^A-Za-z0-9._-]", "_", "/".join(url.rstrip("/").split("/")[-2:]))
    return f"inspect-{parts.strip('._') or 'store'}"
