"""Reads and ingests folders as the stage does, in the test's process."""

from __future__ import annotations

from sd3core.data.folder_captions import FolderCaptions
from sd3core.data.folder_listing import list_folder
from sd3core.data.folder_source import (
    FolderItem,
    FolderSlice,
    caption_facts,
    caption_notes,
    deal_folder,
    read_item,
    storable,
)
from sd3core.data.ingest_folder import FolderWorker, IngestedSlice, check_usable
from sd3core.data.row_fields import RowFields
from sd3core.data.store import Store
from sd3core.recipe import Data


def slices_of(data: Data, captions_needed: bool = False) -> list[FolderSlice]:
    """Raises DataError where no image can be used."""
    listing = list_folder(data.folder)
    captions = FolderCaptions(listing.root, data.folder, listing.files(), RowFields.of_metadata(data))
    slices = deal_folder(listing, captions, data.rows_per_shard)
    check_usable(data, listing, captions, slices, captions_needed)
    return slices


def read_items(data: Data, captions_needed: bool = False) -> tuple[list[FolderItem], list[str]]:
    """Every image with its caption, by key, and what is told of the captions."""
    listing = list_folder(data.folder)
    captions = FolderCaptions(listing.root, data.folder, listing.files(), RowFields.of_metadata(data))
    parts = [
        [read_item(listing.root, image, data, captions_needed) for image in part.images()]
        for part in deal_folder(listing, captions, data.rows_per_shard)
    ]
    facts = [caption_facts(items, data) for items in parts]
    told = [*listing.notes(), *captions.metadata.notes]
    told += caption_notes(data, facts, len(captions.files.images), captions, captions_needed)
    return sorted((item for items in parts for item in items), key=lambda item: item.key), list(map(storable, told))


def ingest_folder(
    store: Store, data: Data, captions_needed: bool = False, folder: str = "raw"
) -> dict[int, IngestedSlice]:
    """Every shard, by its number."""
    worker = FolderWorker(data, store.url, folder, captions_needed)
    made = {}
    for part in slices_of(data, captions_needed):
        made[part.number] = worker(part)
        assert (
            worker.progress == len(part.lines) == made[part.number].record.rows + len(made[part.number].record.failed)
        )
    return made
