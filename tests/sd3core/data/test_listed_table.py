"""A table of images: every row is an image, a caption more, or counted with its reason; its rows are dealt as files are."""

from __future__ import annotations

import csv
import io
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from folder_ingest import ingest_folder, read_items, slices_of
from PIL import Image
from source_files import put_images

from sd3core.data.folder_captions import FolderChanged
from sd3core.data.folder_source import NO_CAPTION_IN_ROW
from sd3core.data.image_files.listed_table import (
    LEADS_OUT,
    MISSING,
    NO_FILE,
    ROW_TWICE,
    URL_IN_ROW,
    ListedTable,
)
from sd3core.data.image_files.table_rows import (
    LONGEST_ROW_BYTES,
    MORE_CELLS,
    NO_JSON,
    NO_PATH,
    NO_TEXT_OF_UTF8,
    NO_TEXTS,
    OPEN_QUOTE,
    TOO_LONG_ROW,
    read_format,
)
from sd3core.data.ingest import captions_column
from sd3core.data.ingest_folder import FURTHER_ROWS, FolderWorker
from sd3core.data.shards import read_shard_index
from sd3core.errors import DataError
from sd3core.recipe import Data


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def _data(table: Path, **changes) -> Data:
    return Data(name="pictures", source="table", table=str(table), **changes)


def _jsonl(table: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    table.write_bytes(b"\n".join(lines) + b"\n")
    return table


def _csv(table: Path, *rows: list[str], delimiter: str = ",") -> Path:
    sink = io.StringIO()
    csv.writer(sink, delimiter=delimiter).writerows(rows)
    table.write_text(sink.getvalue(), newline="")
    return table


def _row(path: str, *captions: str) -> dict[str, object]:
    return {"path": path, "text": captions[0] if len(captions) == 1 else [*captions]}


def _listed(data: Data, captions_needed=True) -> tuple[dict[str, str], Counter[str]]:
    """Captions by image, and how often each reason."""
    items, _ = read_items(data, captions_needed)
    return (
        {item.name: " | ".join(item.captions) for item in items if not item.problem},
        Counter(item.problem for item in items if item.problem),
    )


def test_paths_begin_in_the_tables_folder_or_another_or_are_whole(folder, tmp_path):
    put_images(folder, "sub/a.png", "b.png")
    put_images(tmp_path, "elsewhere/c.png")
    rows = [_row("sub/a.png", "a"), _row(str(folder / "b.png"), "b"), _row(str(tmp_path / "elsewhere/c.png"), "c")]
    images, reasons = _listed(_data(_jsonl(folder / "t.jsonl", *rows)))
    assert images == {"sub/a.png": "a", "b.png": "b", f"{tmp_path}/elsewhere/c.png": "c"} and not reasons
    (tmp_path / "tables").mkdir()
    moved = _data(_jsonl(tmp_path / "tables/t.jsonl", *rows), folder=str(folder))
    assert _listed(moved) == (images, reasons)
    (tmp_path / "link").symlink_to(folder)
    spelled = _jsonl(folder / "t.jsonl", _row(f"{tmp_path}/link/b.png", "b"), _row(f"file://{folder}/sub/a.png", "a"))
    assert _listed(_data(spelled, folder=str(tmp_path / "link")))[0] == {"b.png": "b", "sub/a.png": "a"}


def test_every_row_is_counted_and_every_reason_is_told(folder, file_store):
    put_images(folder, "a.png", "b.png", "c.png", "small.png")
    Image.new("RGB", (3, 3)).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"no image")
    rows = [
        _row("a.png", "one"),
        _row("a.png", "two"),  # one more caption of a.png
        _row("./a.png", "one"),  # nothing new
        _row("b.png", "b", "other b"),
        _row("c.png", ""),
        _row("nowhere.png", "x"),
        _row("nowhere.png", "x"),
        {"path": "", "text": "x"},
        {"text": "x"},
        {"path": 5, "text": "x"},
        _row(".", "x"),
        _row("a.png/b.png", "x"),
        {"path": "b.png", "text": {"de": "x"}},
        _row("../out.png", "x"),
        _row("https://host/a.png", "x"),
        _row("small.png", "x"),
        _row("broken.png", "x"),
        b'{"path": "a.png", "te',
        b'["a.png", "x"]',
        b"",  # an empty line is no row
        b'{"path": "a.png", "text": "\xff"}',
        b'{"path": "' + b"a" * LONGEST_ROW_BYTES + b'"}',
        _row("b.png", "a third b"),
    ]
    made = ingest_folder(file_store, _data(_jsonl(folder / "t.jsonl", *rows)), captions_needed=True)
    records = [part.record for part in made.values()]
    failed = Counter(row.reason for record in records for row in record.failed)
    assert failed == {
        "a side is shorter than 32 px (data.min_side_px)": 1,
        "not an image that can be read (save it as JPEG or PNG)": 1,
        MISSING: 2,
        ROW_TWICE: 2,
        NO_CAPTION_IN_ROW: 1,
        NO_PATH: 3,
        NO_FILE: 1,
        NO_TEXTS: 1,
        LEADS_OUT: 1,
        URL_IN_ROW: 1,
        NO_JSON: 2,
        NO_TEXT_OF_UTF8: 1,
        TOO_LONG_ROW: 1,
    }
    assert failed.total() == 18
    assert sum(record.rows for record in records) == 2
    assert sum(record.extra.get(FURTHER_ROWS, 0) for record in records) == 2
    stored = {}
    for record in records:
        index = read_shard_index(file_store, "raw", record.stem)
        stored |= dict(zip(index["source"].to_pylist(), captions_column(index), strict=True))
    assert stored == {"a.png": ["one", "two"], "b.png": ["b", "other b", "a third b"]}
    names = [row.key for record in records for row in record.failed if row.reason == NO_JSON]
    assert sorted(names) == ['row ["a.png", "x"]', 'row {"path": "a.png", "te']


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.csv", "\t"), ("t.tsv", "\t")])
def test_cells_in_quotes_may_hold_anything(folder, name, delimiter):
    put_images(folder, "a.png", "b.png", "c, d.png")
    rows = [
        ["Path", "short", "long"],
        ["a.png", 'a "quoted" word', "two\nlines, and\tmore; so"],
        ["c, d.png", "", "plain"],
        ["b.png", "b", '"'],
    ]
    data = _data(_csv(folder / name, *rows, delimiter=delimiter), image_field="Path", caption_fields=("short", "long"))
    assert _listed(data) == (
        {"a.png": 'a "quoted" word | two lines, and more; so', "c, d.png": "plain", "b.png": 'b | "'},
        {},
    )


def test_a_broken_row_of_a_csv_costs_no_other(folder):
    put_images(folder, "a.png", "b.png", "c.png", "d.png")
    lines = [
        "path,text",
        'a.png,a 5" pipe',  # a quote within a cell is a character
        'b.png,"never closed',
        "c.png,one, two",  # which of it is the caption?
        "d.png,d,",  # an empty cell more is none
        ",x",
        "a.png",  # no caption
        'c.png,"fine"',
    ]
    (folder / "t.csv").write_text("\n".join(lines + [f"x{n}.png,x" for n in range(300)]))
    images, reasons = _listed(_data(folder / "t.csv"))
    assert images == {"a.png": 'a 5" pipe', "d.png": "d", "c.png": "fine"}
    assert reasons == {OPEN_QUOTE: 1, MORE_CELLS: 1, NO_PATH: 1, ROW_TWICE: 1, MISSING: 300}


def test_windows_lines_and_a_mark_of_byte_order(folder):
    put_images(folder, "a.png", "b.png")
    (folder / "t.csv").write_bytes(b"\xef\xbb\xbfpath,text\r\na.png,a\r\n\r\nb.png,b")
    assert _listed(_data(folder / "t.csv")) == ({"a.png": "a", "b.png": "b"}, {})
    (folder / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a.png", "caption": "a"}\r\n\r\n')
    assert _listed(_data(folder / "t.jsonl")) == ({"a.png": "a"}, {})


def test_columns_are_found_by_their_names_and_it_is_told(folder):
    put_images(folder, "a.png")
    table = _csv(folder / "t.csv", ["id", "image", "label", "prompt"], ["1", "a.png", "not this", "a"])
    source = ListedTable(_data(table))
    assert _listed(_data(table))[0] == {"a.png": "a"}
    assert source.notes() == [
        f"data.table {table}: images from 'image', captions from 'prompt' (data.image_field, data.caption_fields)"
    ]
    assert ListedTable(_data(table, image_field="image", caption_fields=("prompt", "label"))).notes() == []


@pytest.mark.parametrize(("name", "content", "words"), [
    ("t.csv", "a,b\n1,2", "no column of images is known by its name; name it in data.image_field: a, b"),
    ("t.csv", "path,path\n1,2", "two columns are called 'path'; give each a name of its own"),
    ("t.csv", b"\xff\xfe", "not UTF-8; save it as UTF-8"),
    ("t.csv", "", "no column of images is known by its name; name it in data.image_field: none"),
    ("t.jsonl", "nothing", "no column of images is known by its name; name it in data.image_field: none"),
    ("t.jsonl.gz", "", "its rows cannot be read by their places; unpack it"),
    ("t.json", "[]", "its rows cannot be read by their places; write a row a line as .jsonl, or a .csv or .tsv"),
    ("t.csv", "path,text\n", "no usable image (it holds no image file"),
])  # fmt: skip
def test_a_table_that_cannot_be_read_is_one_line(folder, name, content, words):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        slices_of(_data(folder / name))
    assert str(caught.value).startswith(f"data.table {folder / name}: ") and words in str(caught.value)


def test_a_column_that_is_not_there_and_a_table_that_is_not(folder):
    table = _csv(folder / "t.csv", ["path", "text"], ["a.png", "a"])
    with pytest.raises(DataError, match="no column 'words'; its columns: path, text"):
        ListedTable(_data(table, caption_fields=("words",)))
    with pytest.raises(DataError, match="data.table .*gone.csv: No such file or directory; name another"):
        ListedTable(_data(folder / "gone.csv"))
    with pytest.raises(DataError, match=f"no usable image .1 rejected: {MISSING}"):
        slices_of(_data(table))


def _grown(folder: Path, file_store, *rows: dict) -> tuple[dict[str, bool], dict[int, str]]:
    """Stems of the shards, whether each stood, and the slices' digests."""
    data = _data(_jsonl(folder / "t.jsonl", *rows), rows_per_shard=8)
    made = ingest_folder(file_store, data)
    return {p.record.stem: p.stood for p in made.values()}, {p.number: p.seen for p in ListedTable(data).slices()}


def test_a_row_that_changes_comes_or_goes_makes_one_shard(folder, file_store):
    put_images(folder, *(f"{n}.png" for n in range(60)))
    rows = [_row(f"{n}.png", f"number {n}") for n in range(59)]
    before, seen = _grown(folder, file_store, *rows)
    assert len(before) >= 8 and not any(before.values())

    for changed in (
        [*rows[:5], _row("5.png", "a much longer caption of number 5"), *rows[6:]],
        [*rows[:20], *rows[21:]],
        [_row("59.png", "one more"), *rows],
        [*rows, _row("7.png", "another caption of it")],
    ):
        after, now = _grown(folder, file_store, *changed)
        assert sum(not stood for stood in after.values()) == 1
        assert sum(now.get(number) != digest for number, digest in seen.items()) == 1
        _grown(folder, file_store, *rows)
    after, _ = _grown(folder, file_store, *reversed(rows))
    assert all(after.values())  # another order is the same data


def test_an_image_that_changes_is_another_slice_and_one_that_comes_is_found(folder, file_store):
    put_images(folder, *(f"{n}.png" for n in range(30)))
    rows = [_row(f"{n}.png", f"number {n}") for n in range(31)]
    _, seen = _grown(folder, file_store, *rows)
    Image.new("RGB", (50, 50)).save(folder / "3.png")
    after, now = _grown(folder, file_store, *rows)
    assert sum(not stood for stood in after.values()) == 1 == sum(now[n] != seen[n] for n in seen)
    put_images(folder, "30.png")
    after, _ = _grown(folder, file_store, *rows)
    assert sum(not stood for stood in after.values()) == 1


def test_a_table_that_changes_under_the_workers_fails_its_shards(folder, file_store):
    put_images(folder, "a.png")
    (part,) = ListedTable(_data(_jsonl(folder / "t.jsonl", _row("a.png", "a")))).slices()
    _jsonl(folder / "t.jsonl", _row("a.png", "other"))
    worker = FolderWorker(_data(folder / "t.jsonl"), file_store.url, "raw", True)
    with pytest.raises(FolderChanged, match=r"t.jsonl changed since the folder was listed"):
        worker(part)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_of_a_row_the_driver_holds_less_than_sixty_bytes_and_opens_no_image(folder, monkeypatch, name):
    rows = 60_000
    with (folder / name).open("w") as file:
        file.write("path,text\n" if name == "t.csv" else "")
        for number in range(rows):
            path, text = f"images/{number // 1000:05d}/{number:09d}.jpg", f"a caption of number {number} " * 5
            file.write(f"{path},{text}\n" if name == "t.csv" else json.dumps({"path": path, "text": text}) + "\n")
    opened = []
    real_open = io.open
    monkeypatch.setattr(
        io, "open", lambda file, *rest, **more: opened.append(str(file)) or real_open(file, *rest, **more)
    )
    tracemalloc.start()
    source = ListedTable(_data(folder / name))
    slices = source.slices()
    peak = tracemalloc.get_traced_memory()[1]
    del source
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(part.rows for part in slices) == rows and {*opened} == {str(folder / name)}
    assert peak / rows < 60 and held / rows < 20
    part = slices[7]
    assert Counter(image.problem for image in part.images()) == {MISSING: part.rows}


def test_records_and_their_places(folder):
    content = b'path,text\na,"x\ny"\nb,plain\n\nc,"un\nd,e\n'
    (folder / "t.csv").write_bytes(content)
    with (folder / "t.csv").open("rb") as file:
        form = read_format(file, _data(folder / "t.csv"))
        found = [*form.records(file)]
    assert [record for _, record in found] == [b'a,"x\ny"\n', b"b,plain\n", b'c,"un\n', b"d,e\n"]
    assert all(content[place : place + len(record)] == record for place, record in found)


def test_names_that_are_not_utf8_stay_in_their_rows(folder):
    """A path in a table is text: a file whose name is no UTF-8 cannot be named there, and nothing breaks."""
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    (folder / "t.csv").write_bytes(b"path,text\ncaf\xe9.png,x\n\x1b[31m.png,x\n")
    assert _listed(_data(folder / "t.csv"))[1] == {NO_TEXT_OF_UTF8: 1, MISSING: 1}
