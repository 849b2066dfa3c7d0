"""Captions of class folders: the recipe's template with each class's words in it.

The class of an image is the folder that it lies in, as Hugging Face's imagefolder takes it, and its word that folder's name. Where
a file of names is given it is the nearest folder around the image that has a name there, and each of its words makes a caption.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sd3core.data.caption_text import text_encoding
from sd3core.errors import DataError, with_mend
from sd3core.recipe import CLASS, Data
from sd3core.recipe_yaml import parse_yaml
from sd3core.words import counted, one_line, some

OUTSIDE = "lies in no class folder (data.class_caption), and has no caption of its own"
UNNAMED = "lies in a folder that data.class_names lacks, and has no caption of its own"
LARGEST_NAMES_BYTES = 64_000_000  # of a file of names: ImageNet's 21,841 classes take one
NAME_FILES = "a .yaml or .json of FOLDER: WORD or FOLDER: [WORD, WORD], or a .csv or .tsv with a folder and its words in each row"


@dataclass(frozen=True)
class ClassFolders:
    """What is said of the images of a class; `names`: the words of each folder's name, None where they are the name."""

    template: str
    names: Mapping[str, tuple[str, ...]] | None = None
    names_file: str = ""

    @classmethod
    def of(cls, data: Data) -> ClassFolders | None:
        """None where the recipe has no template. Raises DataError for a file of names that cannot be used."""
        if data.class_caption is None:
            return None
        if data.class_names is None:
            return cls(data.class_caption)
        return cls(data.class_caption, read_class_names(data.class_names), data.class_names)

    @property
    def digest(self) -> str:
        """Another one where a name's words are."""
        return hashlib.sha256(json.dumps(self.names, sort_keys=True).encode()).hexdigest()

    def texts_of(self, path: str) -> tuple[str, ...]:
        """The captions of the image at this path; none where it is of no class."""
        name = self._class_of(path)
        return tuple(self.template.replace(CLASS, word) for word in self._words(name)) if name else ()

    def why_none(self, path: str) -> str:
        """Why the image has none."""
        return OUTSIDE if "/" not in path or self.names is None else UNNAMED

    def notes(self, paths: Iterable[str]) -> list[str]:
        """What is told of a folder's images: how many classes there are, and which folders are none."""
        classes: Counter[str] = Counter()
        unnamed: Counter[str] = Counter()
        for path in paths:
            if name := self._class_of(path):
                classes[name] += 1
            elif "/" in path:
                unnamed[path.rpartition("/")[0]] += 1
        notes = []
        if classes:
            first = [" or ".join(map(repr, self.texts_of(f"{name}/"))) for name in sorted(classes)]
            notes.append(f"captions by {counted(len(classes), 'class folder')}: {some(first, len(first))}")
        if unnamed:
            names = [f"{name} ({counted(unnamed[name], 'image')})" for name in sorted(unnamed)]
            lacked = f"data.class_names {self.names_file} lacks" if self.names is not None else "not a class's name:"
            notes.append(f"{lacked} {counted(len(unnamed), 'folder')}: {some(names, len(names))}")
        return notes

    def _class_of(self, path: str) -> str:
        """The name of an image's class folder; "" where there is none."""
        *folders, _ = path.split("/")
        known = self.names.keys() if self.names is not None else {name for name in folders[-1:] if _tidied(name)}
        return next((name for name in reversed(folders) if name in known), "")

    def _words(self, name: str) -> tuple[str, ...]:
        return (_tidied(name),) if self.names is None else self.names[name]


def read_class_names(file: str) -> dict[str, tuple[str, ...]]:
    """Folder's name -> its words, from a YAML, JSON or CSV file. Raises DataError of one line."""
    try:
        path = Path(file)
        if path.stat().st_size > LARGEST_NAMES_BYTES:
            raise DataError(
                f"data.class_names {file}: larger than {LARGEST_NAMES_BYTES:,} bytes; give it as {NAME_FILES}"
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"data.class_names {file}: {with_mend(error)}") from None
    encoding, skipped = text_encoding(content)
    try:
        text = content[skipped:].decode(encoding)
        pairs = _pairs(path.suffix.lower(), text)
    except UnicodeDecodeError:
        raise DataError(f"data.class_names {file}: not UTF-8; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError, csv.Error) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"data.class_names {file}: cannot be read ({problem}); give it as {NAME_FILES}") from None
    names: dict[str, tuple[str, ...]] = {}
    for folder, words in pairs:
        if not isinstance(folder, str):
            raise DataError(f"data.class_names {file}: the folder {folder!r} is no text; put it in quotes")
        listed = [words] if isinstance(words, str) else words
        if type(listed) is not list or not all(isinstance(word, str) for word in listed):
            raise DataError(
                f"data.class_names {file}: the words of {folder!r} are no text or list of texts; put them in quotes"
            )
        clean = tuple(dict.fromkeys(filter(None, map(one_line, listed))))
        if not clean:
            raise DataError(f"data.class_names {file}: {folder!r} has no word; give it one, or take it out")
        if folder in names:
            raise DataError(f"data.class_names {file}: {folder!r} stands twice; keep one, with all its words")
        names[folder] = clean
    if not names:
        raise DataError(f"data.class_names {file}: it names no folder; give it as {NAME_FILES}")
    return names


def _pairs(suffix: str, text: str) -> Iterable[tuple[Any, Any]]:
    """Folders and their words as they are written. Raises ValueError, or what the format's reader raises."""
    if suffix in (".csv", ".tsv"):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if suffix == ".tsv" else ",", strict=True)
        return [(row[0].strip(), row[1:]) for row in reader if any(row)]
    if suffix == ".json":
        found = json.loads(text, object_pairs_hook=_Pairs)
        if not isinstance(found, _Pairs):
            raise ValueError("not an object")
        return found
    if suffix in (".yaml", ".yml"):
        found = parse_yaml(text)
        if not isinstance(found, dict):
            raise ValueError("not a mapping")
        return found.items()
    raise ValueError(f"of another kind: {suffix or 'no ending'}")


class _Pairs(list):
    """A JSON object as pairs, so that what stands there twice is seen; and no list of words."""


def _tidied(name: str) -> str:
    """A folder's name as a word: underscores are spaces."""
    return one_line(name.replace("_", " "))
