"""Reads a stored object as a file: by ranges, one of them ahead of its reader.

A bounded part of it is in memory. Tars are read from front to back, parquet files where their footers say. An object counts as
the one that was listed where its size and ETag (or time) are, before the first byte is taken and after the last.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from sd3core.data.store import Store, StoreDamaged, StoreDenied, StoreEntry
from sd3core.errors import UserError

CHUNK_BYTES = 8 << 20  # of one request
CHUNKS_KEPT = 6  # a parquet file's columns are read in turn


class SourceChanged(UserError):
    """An object is not the one that was listed. No reject: the task fails, and is tried again."""

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} changed since it was listed; run ingest again when nobody writes to it")


class RangedFile:
    """A context. Raises SourceChanged where the object is another one, and the store's errors as they are."""

    def __init__(self, store: Store, path: str, size: int, tag: str) -> None:
        self.store, self.path, self.size, self.tag = store, path, size, tag
        self.position, self.closed = 0, False
        self.requests = 0
        self._chunks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._last = -1  # the chunk that was read before
        self._threads = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        self._threads.shutdown(cancel_futures=True)
        self._chunks.clear()

    @property
    def url(self) -> str:
        return self.store.uri(self.path)

    def check(self) -> None:
        """SourceChanged unless the object is still the one that was listed."""
        self.requests += 1
        if not _same(_entry_of(self.store, self.path), self.size, self.tag):
            raise SourceChanged(self.url)

    def read(self, length: int = -1) -> bytes:
        """The next bytes; fewer at the end alone."""
        end = self.size if length is None or length < 0 else min(self.position + length, self.size)
        parts = []
        while self.position < end:
            number, start = divmod(self.position, CHUNK_BYTES)
            part = self._chunk(number)[start : start + end - self.position]
            parts.append(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def _chunk(self, number: int) -> bytes:
        ahead = number + 1
        self._ask(number)
        if number in (self._last, self._last + 1) and ahead * CHUNK_BYTES < self.size:
            self._ask(ahead)
        self._last = number
        self._chunks.move_to_end(number)
        while len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)[1].cancel()
        try:
            return self._chunks[number].result()
        except StoreDamaged:  # it ends before its listed size
            raise SourceChanged(self.url) from None

    def _ask(self, number: int) -> None:
        if number not in self._chunks:
            start = number * CHUNK_BYTES
            self.requests += 1
            self._chunks[number] = self._threads.submit(
                self.store.get_range, self.path, start, min(CHUNK_BYTES, self.size - start)
            )


def _entry_of(store: Store, path: str) -> StoreEntry:
    try:
        return store.entry(path)
    except StoreDenied:
        # A HEAD says no more than 403: a GET tells an object that is not to be read from credentials that have run out.
        store.get_range(path, 0, 1)
        raise


def _same(entry: StoreEntry, size: int, tag: str) -> bool:
    return (entry.size, entry.tag) == (size, tag)
