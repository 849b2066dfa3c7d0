"""Finds a row's image and captions among the fields of metadata and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sd3core.recipe import Data

# what people call them, ours first
IMAGE_FIELDS = ("file_name", "filename", "file", "image", "image_path", "path", "name", "img")
CAPTION_FIELDS = ("text", "caption", "captions", "prompt", "description", "label", "title")


class RowFields(NamedTuple):
    """The names under which rows have their image and their captions."""

    image: str = IMAGE_FIELDS[0]
    captions: tuple[str, ...] = CAPTION_FIELDS[:1]

    @classmethod
    def of_metadata(cls, data: Data) -> RowFields:
        """Those that the recipe names, else Hugging Face's file_name and text."""
        return cls(data.image_field or PLAIN_FIELDS.image, data.caption_fields or PLAIN_FIELDS.captions)

    @property
    def said(self) -> str:
        """Reads like "file_name and text"."""
        return f"{self.image} and {' or '.join(self.captions)}"


PLAIN_FIELDS = RowFields()


def texts_of(row: Mapping[str, Any], names: Sequence[str]) -> tuple[str, ...] | None:
    """What stands under these names, in their order, as it was written: each a text, nothing, or a list of such.

    None where something else stands there.
    """
    texts: list[str] = []
    for name in names:
        value = row.get(name)
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | None):
                return None
            texts.append(one or "")
    return tuple(filter(None, texts))
