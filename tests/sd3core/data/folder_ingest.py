"""Reads and ingests folders and tables as the stage does, in the test's process."""

from __future__ import annotations

from pathlib import Path

from sd3core.data.folder_source import FolderItem, FolderSlice, caption_facts, read_item, storable
from sd3core.data.image_files.listed_table import TableSlice, list_files
from sd3core.data.ingest_folder import FURTHER_ROWS, FolderWorker, IngestedSlice, check_usable
from sd3core.data.store import Store
from sd3core.recipe import Data


def slices_of(data: Data, captions_needed: bool = False) -> list[FolderSlice] | list[TableSlice]:
    """Raises DataError where no image can be used."""
    source = list_files(data)
    slices = source.slices()
    check_usable(source, slices, captions_needed)
    return slices


def read_items(data: Data, captions_needed: bool = False) -> tuple[list[FolderItem], list[str]]:
    """Every image with its captions, by key, and what is told of the captions."""
    source = list_files(data)
    parts = [
        [read_item(Path(part.root), image, data, captions_needed) for image in part.images()]
        for part in source.slices()
    ]
    told = source.notes() + source.caption_notes([caption_facts(items, data) for items in parts], captions_needed)
    return sorted((item for items in parts for item in items), key=lambda item: item.key), list(map(storable, told))


def ingest_folder(
    store: Store, data: Data, captions_needed: bool = False, folder: str = "raw"
) -> dict[int, IngestedSlice]:
    """Every shard, by its number."""
    worker = FolderWorker(data, store.url, folder, captions_needed)
    made = {}
    for part in slices_of(data, captions_needed):
        made[part.number] = worker(part)
        record = made[part.number].record
        assert part.rows == record.rows + len(record.failed) + record.extra.get(FURTHER_ROWS, 0)
        assert worker.progress == record.rows + len(record.failed)
    return made
