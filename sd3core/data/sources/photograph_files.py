"""Writes the packages' photographs as img2dataset's tars, or as a parquet file.

So that both kinds of source can be tried on real files, in a folder or a bucket, where nothing can be downloaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sd3core.data.photographs import Photograph, read_photographs
from sd3core.data.sources.listing import ROWS_TABLE, STATS
from sd3core.data.sources.rows import SUCCESS
from sd3core.data.store import Store

TAR_ROWS = 8  # two tars
GROUP_ROWS = 4
# Hugging Face's image column
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def put_photographs(store: Store, form: str) -> tuple[int, list[str]]:
    """`form`: of FORMS. Returns how many there are, and the names of the files, in the order in which they are put."""
    photographs = list(read_photographs())
    names = []
    for name, content in FORMS[form](photographs):
        store.put(name, content)
        names.append(name)
    return len(photographs), names


def _folder(photographs: list[Photograph]) -> Iterator[tuple[str, bytes]]:
    for photograph in photographs:
        yield photograph.file_name, photograph.content
        yield f"{photograph.name}.txt", f"{photograph.caption}\n".encode()


def _tars(photographs: list[Photograph]) -> Iterator[tuple[str, bytes]]:
    """00000.tar, its table of rows and, last, its statistics, and so on. Images keep their own format."""
    for number, start in enumerate(range(0, len(photographs), TAR_ROWS)):
        chosen = photographs[start : start + TAR_ROWS]
        rows = [_row(photograph, f"{number:05d}{at:04d}") for at, photograph in enumerate(chosen)]
        stats = {"count": len(rows), "successes": len(rows), "status_dict": {SUCCESS: len(rows)}}
        yield f"{number:05d}.tar", _tar(chosen, rows)
        yield f"{number:05d}{ROWS_TABLE}", _parquet(pa.Table.from_pylist(rows), len(rows))
        yield f"{number:05d}{STATS}", json.dumps(stats).encode()


def _parquet_file(photographs: list[Photograph]) -> Iterator[tuple[str, bytes]]:
    images = [{"bytes": photograph.content, "path": photograph.file_name} for photograph in photographs]
    captions = [photograph.caption for photograph in photographs]
    table = pa.table({"image": pa.array(images, IMAGE_TYPE), "caption": captions})
    yield "photographs.parquet", _parquet(table, GROUP_ROWS)


FORMS: dict[str, Callable[[list[Photograph]], Iterator[tuple[str, bytes]]]] = {
    "folder": _folder,
    "tars": _tars,
    "parquet": _parquet_file,
}


def _row(photograph: Photograph, key: str) -> dict[str, str | int | None]:
    """What img2dataset says of an image."""
    width, height = Image.open(io.BytesIO(photograph.content)).size
    return {
        "url": photograph.file_name,
        "caption": photograph.caption,
        "key": key,
        "status": SUCCESS,
        "error_message": None,
        "width": width,
        "height": height,
        "sha256": hashlib.sha256(photograph.content).hexdigest(),
    }


def _tar(photographs: list[Photograph], rows: list[dict[str, str | int | None]]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for photograph, row in zip(photographs, rows, strict=True):
            files = {
                photograph.extension: photograph.content,
                "json": json.dumps(row).encode(),
                "txt": photograph.caption.encode(),
            }
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{row['key']}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return sink.getvalue()


def _parquet(table: pa.Table, group: int) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue()
