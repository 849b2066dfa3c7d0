"""Writes small tars and parquet files as img2dataset, webdataset and Hugging Face make them."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sd3core.data.store import open_store

LONG_AGO_S = 1_700_000_000


def picture(shade: int, format_: str = "PNG", size: tuple[int, int] = (40, 40)) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256 % 256, 7)).save(sink, format_)
    return sink.getvalue()


def put_images(folder: Path, *names: str) -> None:
    """Images of different content, by their paths below the folder."""
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(shade, size=(48, 40)))


def tar_of(members: Iterable[tuple[str, bytes]], format_: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format_) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def sample(key: str, shade: int, caption: str | None = None, **more: bytes) -> list[tuple[str, bytes]]:
    """KEY.png, KEY.txt and what else is given by extension."""
    words = [] if caption is None else [(f"{key}.txt", caption.encode())]
    return [(f"{key}.png", picture(shade)), *words, *((f"{key}.{name}", content) for name, content in more.items())]


def samples(first: int, count: int) -> list[tuple[str, bytes]]:
    return [m for at in range(first, first + count) for m in sample(f"{at:09d}", at, f"number {at}")]


def img2dataset(first: int, statuses: list[str]) -> dict[str, bytes]:
    """What img2dataset leaves of URLs with these statuses: by what stands behind 00000."""
    rows, members, counts = [], [], {}
    for at, status in enumerate(statuses, start=first):
        row = {"url": f"https://x/{at}", "caption": f"number {at}", "key": f"{at:09d}", "status": status}
        row |= {"error_message": None if status == "success" else "HTTP Error 404: Not Found"}
        rows.append(row)
        counts[status] = counts.get(status, 0) + 1
        if status == "success":
            members += [
                (f"{at:09d}.jpg", picture(at, "JPEG")),
                (f"{at:09d}.json", json.dumps(row).encode()),
                (f"{at:09d}.txt", row["caption"].encode()),
            ]
    stats = {"count": len(rows), "successes": counts.get("success", 0), "status_dict": counts}
    return {
        ".tar": tar_of(members),
        ".parquet": parquet_of(rows),
        "_stats.json": json.dumps(stats).encode(),
    }


def parquet_of(rows: list[Mapping], schema: pa.Schema | None = None, group: int = 1_000_000) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink, row_group_size=group, compression="snappy")
    return sink.getvalue()


class SourceFolder:
    """A place for source files: a folder of this machine, or a prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.store = open_store(url)

    def put(self, name: str, content: bytes, at: float = LONG_AGO_S) -> None:
        """Written to last `at`, where a file's time says so."""
        self.store.put(name, content)
        if (path := self.store.local_path(name)) is not None:
            os.utime(path, (at, at))

    def put_dataset(self, number: str, files: Mapping[str, bytes], at: float = LONG_AGO_S) -> None:
        for ending, content in files.items():
            self.put(number + ending, content, at)

    def delete(self, name: str) -> None:
        self.store.delete(name)
