"""`--data`: a user's own images, as a folder, or as tars or parquet files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sd3core.data.folder_listing import holds_nothing
from sd3core.data.sources.listing import SUFFIXES
from sd3core.data.sources.urls import S3_URL
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.files.local_paths import expanded
from sd3core.recipe import Recipe
from sd3core.recipe_yaml import yaml_text
from sd3core.shown_text import is_utf8

OWN_TOKENS = 32  # that captions of a user's own images have at least


def folder_overrides(recipe: Recipe, place: str | Path) -> list[str]:
    """Overrides for a user's own images: their data set, towers and run, no drawn world's captioner.

    A folder that holds no image is taken for what it holds of tars or parquet files.
    """
    place = str(place)
    if place.startswith(S3_URL):
        if not (found := _files_of(place, (entry.path for entry in open_store(place).list()))):
            kinds = " or ".join(SUFFIXES.values())
            raise DataError(
                f"DATA (--data) {place}: no {kinds} below it; images by themselves are read from a folder here"
            )
        return [*found, *_own_run(recipe, place.rstrip("/").rpartition("/")[2], place)]
    if re.match(r"[a-z][a-z0-9+.-]+:/", place):
        raise DataError(f"DATA (--data) {place}: a URL that is not read (s3:// is); name a folder on this machine")
    folder = expanded(place).resolve()
    if not folder.is_dir():
        raise DataError(f"DATA (--data) {place}: no such folder")
    if not is_utf8(str(folder)):
        raise DataError(f"DATA (--data) {place}: its name is not UTF-8, and recipes are; rename it")
    found = _files_of(str(folder), _names_in(folder)) if holds_nothing(folder) else []
    images = ["data.source=folder", f"data.folder={yaml_text(str(folder))}"]
    return [*(found or images), *_own_run(recipe, folder.name, str(folder))]


def _files_of(url: str, names: Iterable[str]) -> list[str]:
    """Tars go before parquet files: img2dataset puts one beside each tar. [] where neither is there."""
    there = {suffix for name in names for suffix in SUFFIXES.values() if name.lower().endswith(suffix)}
    source = next((source for source, suffix in SUFFIXES.items() if suffix in there), None)
    return [f"data.source={source}", f"data.urls={yaml_text(url)}"] if source else []


def _names_in(folder: Path) -> Iterator[str]:
    """Of files below it, without hidden folders; none of them is looked at."""
    for _, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from names


def _own_run(recipe: Recipe, called: str, place: str) -> list[str]:
    """`place`: what tells it from others that are called so."""
    slug = re.sub(r"[^a-z0-9]+", "-", called.lower()).strip("-")[:40] or "folder"
    name = json.dumps(f"{slug}-{hashlib.sha256(place.encode()).hexdigest()[:6]}")
    overrides = [f"data.name={name}", f"towers.name={name}", f"run={name}"]
    if recipe.caption.captioner == "small_world":
        overrides.append("caption.captioner=none")
    for key in ("clip_tokens", "t5_tokens"):  # the drawn world's captions are shorter than what people write
        if getattr(recipe.text, key) < OWN_TOKENS:
            overrides.append(f"text.{key}={OWN_TOKENS}")
    return overrides
