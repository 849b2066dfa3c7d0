"""A folder of images as ingest takes it: what it lists, tells and deals to shards.

Whatever else names files of this machine (`sd3core.data.image_files.listed_table`) has the same interface.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3core.data.folder_captions import FolderCaptions
from sd3core.data.folder_listing import list_folder
from sd3core.data.folder_source import FolderSlice, caption_notes, deal_folder
from sd3core.data.image_files.class_folders import ClassFolders
from sd3core.data.row_fields import RowFields
from sd3core.data.shards import parts_digest
from sd3core.recipe import Data


class ListedFolder:
    """Names, sizes and times of a folder's files. Raises DataError where it cannot be listed."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.named = f"data.folder {data.folder}"  # in messages
        self.listing = list_folder(data.folder, takes_sidecars=data.sidecars == "take")
        self.classes = ClassFolders.of(data)

    @property
    def place(self) -> Path:
        """What names it among all that is ingested into one data set."""
        return self.listing.root

    @property
    def digest(self) -> str:
        """Another one where any name, size or time is, or the words of a class."""
        if self.classes is None or self.classes.names is None:
            return self.listing.digest
        return parts_digest(self.listing.digest, self.classes.digest)

    @property
    def at_rest(self) -> bool:
        """No file was written to so shortly before that it may be written to again unseen."""
        return self.listing.at_rest

    @cached_property
    def captions(self) -> FolderCaptions:
        fields = RowFields.of_metadata(self.data)
        return FolderCaptions(self.listing.root, self.data.folder, self.listing.files(), fields, self.classes)

    def notes(self) -> list[str]:
        """What is told before any image is opened."""
        has_words = self.captions.has_words
        notes = [*self.listing.notes(), *self.listing.sidecar_note(has_words), *self.captions.metadata.notes]
        if self.classes is not None:
            notes += self.classes.notes(file.path for file in self.listing.images_taken(has_words))
        return notes

    def slices(self) -> list[FolderSlice]:
        """Its images by shards."""
        return deal_folder(self.listing, self.captions, self.data.rows_per_shard)

    def caption_notes(self, facts: Iterable[dict[str, Any]], captions_needed: bool) -> list[str]:
        """What is told of captions once all `facts` are known."""
        captions = self.captions
        images = sum(1 for _ in self.listing.images_taken(captions.has_words))
        not_taken, noted = captions.not_taken, bool(captions.metadata.notes)
        return caption_notes(self.data, facts, images, not_taken, noted, captions_needed)
