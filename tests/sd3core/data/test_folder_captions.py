"""Captions of a folder: how they may be named and written, and what is told of those that are not taken."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path

import pytest
from folder_ingest import ingest_folder, read_items, slices_of
from PIL import Image

from sd3core.data.caption_text import lines_of, mixes_languages, text_encoding
from sd3core.data.folder_source import NO_CAPTION
from sd3core.data.image_names import NEAR, ImageNames
from sd3core.data.ingest import captions_column
from sd3core.data.metadata_files import (
    NAME_ONLY,
    NO_FIELDS,
    NO_IMAGE,
    NO_TEXT,
    NOT_JSON,
    SEVERAL_IMAGES,
    SEVERAL_ROWS,
    TWICE,
    read_metadata,
)
from sd3core.data.shards import read_shard_index
from sd3core.errors import DataError
from sd3core.recipe import Data


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def _images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40)).save(folder / name)


def _data(folder: Path, **changes) -> Data:
    return Data(name="pictures", source="folder", folder=str(folder), **changes)


def _listed(folder: Path, captions_needed=False, **changes) -> tuple[dict[str, str], list[str]]:
    """Captions by image, and what was told."""
    items, told = read_items(_data(folder, **changes), captions_needed)
    return {item.name: item.problem or " | ".join(item.captions) for item in items}, told


def _jsonl(*rows: object) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def _row(name: str, text: str = "words") -> dict[str, str]:
    return {"file_name": name, "text": text}


@pytest.mark.parametrize("where", ["", "lists"])  # of the metadata, beside the images or in a folder of its own
@pytest.mark.parametrize("spelled", [
    "images/Sub Folder/caf\u00e9.jpg",
    "./images/Sub Folder//caf\u00e9.jpg",
    "images\\Sub Folder\\caf\u00e9.jpg",
    ".\\images\\Sub Folder\\caf\u00e9.jpg",
    "IMAGES/sub folder/CAF\u00c9.JPG",
    "images/Sub%20Folder/caf%C3%A9.jpg",
    "images/Sub Folder/cafe\u0301.jpg",
    " images/Sub Folder/caf\u00e9.jpg\t",
    "ROOT/images/Sub Folder/caf\u00e9.jpg",
    "file://ROOT/images/Sub%20Folder/caf%C3%A9.jpg",
    "../pictures/images/Sub Folder/caf\u00e9.jpg",
    "/home/somebody/elsewhere/images/Sub Folder/caf\u00e9.jpg",
    "D:\\data\\images\\Sub Folder\\CAFE\u0301.jpg",
])  # fmt: skip
def test_a_name_that_only_one_image_fits_is_taken(folder, where, spelled):
    _images(folder, "images/Sub Folder/caf\u00e9.jpg", "images/other.jpg")
    (folder / where).mkdir(exist_ok=True)
    name = spelled.replace("ROOT", str(folder))
    if where and name.startswith("../pictures"):
        name = f"../{name}"
    (folder / where / "metadata.jsonl").write_text(_jsonl(_row(name), _row("images/other.jpg", "others")))
    captions, told = _listed(folder)
    assert captions == {"images/Sub Folder/caf\u00e9.jpg": "words", "images/other.jpg": "others"} and told == []


def test_an_absolute_path_elsewhere_of_which_only_the_file_name_fits_is_told(folder):
    """Many folders have a 0001.jpg: the words may be those of another image."""
    _images(folder, "0001.jpg", "dogs/0002.jpg", "cats/0003.jpg", "0004.jpg")
    names = ["/old/cats/0001.jpg", "C:\\old\\cats\\0002.jpg", "/old/cats/0003.jpg", "cats/0004.jpg", "0004.jpg"]
    (folder / "metadata.jsonl").write_text(_jsonl(*map(_row, names)))
    captions, told = _listed(folder)
    assert captions == {"0001.jpg": "words", "dogs/0002.jpg": "", "cats/0003.jpg": "words", "0004.jpg": "words"}
    assert [line for line in told if NAME_ONLY in line] == [
        f"1 metadata row used: {NAME_ONLY}: metadata.jsonl line 1 (/old/cats/0001.jpg: 0001.jpg)"
    ]


def test_a_parents_name_and_the_file_systems_accents(folder):
    """`../images/a.jpg` from a folder beside; and a name that the disk has decomposed."""
    decomposed = unicodedata.normalize("NFD", "images/\u00fcber.jpg")
    _images(folder, "images/a.jpg", decomposed)
    (folder / "lists").mkdir()
    (folder / "lists/metadata.jsonl").write_text(
        _jsonl(_row("../images/a.jpg", "a"), _row("../images/\u00fcber.jpg", "b"))
    )
    assert _listed(folder) == ({"images/a.jpg": "a", decomposed: "b"}, [])


def test_names_that_may_mean_something_else_are_told_and_nothing_outside_is_taken(folder, tmp_path):
    _images(folder, "a.jpg", "A.jpg", "train/b.jpg", "c.jpg", "photo_0001.jpg", "sub/c.jpg")
    _images(tmp_path, "out.jpg")
    rows = [
        _row("a.JPG"),  # a.jpg or A.jpg
        _row("val/b.jpg"),  # another b.jpg
        _row("../out.jpg"),
        _row("/data/sub/c.jpg"),  # sub/c.jpg, or c.jpg of a folder sub
        _row("photo_0002.jpg"),
        _row("https://host/photo_0001.jpg"),
        _row("\0"),
        _row("x\n\x1b[31m"),
    ]
    (folder / "metadata.jsonl").write_text(_jsonl(*rows))
    captions, told = _listed(folder)
    assert set(captions.values()) == {""}
    assert told[0] == (
        f"6 metadata rows not used: {NO_IMAGE.format('file_name')}: metadata.jsonl line 2 (val/b.jpg (nearest: train/b.jpg)),"
        " metadata.jsonl line 3 (../out.jpg), metadata.jsonl line 5 (photo_0002.jpg (nearest: photo_0001.jpg)) and 3 more"
    )
    assert told[1] == (
        f"2 metadata rows not used: {SEVERAL_IMAGES.format('file_name')}: metadata.jsonl line 1 (a.JPG: A.jpg, a.jpg),"
        " metadata.jsonl line 4 (/data/sub/c.jpg: sub/c.jpg, c.jpg)"
    )


def test_rows_that_cannot_be_used_are_counted_by_reason_and_named(folder):
    _images(folder, "a.png", "b.png", "sub/c.png", "d.png", "e.png")
    (folder / "a.txt").write_text("metadata wins over this")
    lines = [
        json.dumps(_row("a.png", "\u00e4 from metadata") | {"more": 1}, ensure_ascii=False),
        "",
        "{broken",
        json.dumps(_row("b.png", "b")),
        json.dumps(_row("a.png", "again")),
        json.dumps({"file_name": "d.png", "text": None}),
        json.dumps(["file_name"]),
        json.dumps({"text": "no name"}),
        json.dumps({"file_name": "d.png", "text": 7}),
        json.dumps({"image": "d.png", "caption": "d"}),
        json.dumps({"file_name": "d.png", "prompt": "d"}),
        json.dumps(_row("E.PNG", "one")),
        json.dumps(_row("e.PNG", "two")),
        "[" * 100_000,
    ]
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b'\n{"file_name": "\xff"}')
    (folder / "sub/metadata.jsonl").write_text(json.dumps(_row("c.png", "c \ud800 lone")))
    captions, told = _listed(folder)
    assert captions == {"a.png": "\u00e4 from metadata", "b.png": "b", "sub/c.png": "c lone", "d.png": "", "e.png": ""}
    of_rows = [note for note in told if "metadata row" in note]
    line = "metadata.jsonl line"
    assert sorted(of_rows) == sorted([
        f"4 metadata rows not used: {NOT_JSON}: {line} 3, {line} 7, {line} 14 and 1 more",
        f"2 metadata rows not used: {SEVERAL_ROWS.format('file_name')}: {line} 12 (e.png), {line} 13 (e.png)",
        f"1 metadata row not used: {TWICE}: {line} 5 (a.png)",
        f"1 metadata row not used: {NO_TEXT.format('text')}: {line} 6 (d.png)",
        f"1 metadata row not used: {NO_FIELDS.format('file_name and text')}: {line} 8",
        f"1 metadata row not used: file_name and text must be strings, or lists of strings for captions: {line} 9",
        f"1 metadata row not used: {NO_FIELDS.format('file_name and text')}; set data.image_field=image and data.caption_fields=caption: {line} 10",
        f"1 metadata row not used: {NO_FIELDS.format('file_name and text')}; set data.caption_fields=prompt: {line} 11",
    ])  # fmt: skip


def test_a_rows_file_name_is_shown_as_other_names_are(folder):
    """Escaped and not replaced, joiners of words and emoji as they are; a long one by both its ends."""
    _images(folder, "a.png")
    rows = _row("x\x1b[2J\u200d.png"), _row("sub/" + 50 * "long " + ".png"), _row("a.png")
    (folder / "metadata.jsonl").write_text(_jsonl(*rows), encoding="utf-8")
    [line] = _listed(folder)[1]
    assert "line 1 (x\\x1b[2J\u200d.png" in line and "line 2 (sub/long " in line and "more characters) ..." in line


@pytest.mark.parametrize("empty", ["", " \t", "\u200b", None])
def test_an_empty_text_hides_no_file(folder, empty):
    _images(folder, "a.jpg")
    (folder / "metadata.jsonl").write_text(_jsonl({"file_name": "a.jpg", "text": empty}))
    (folder / "a.txt").write_text("of the file")
    captions, _ = _listed(folder)
    assert captions == {"a.jpg": "of the file"}


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "A.Txt", "a.caption", "A.CAPTION", "a.jpg.txt", "A.JPG.txt", "a.jpg.caption"]
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_caption_files_by_their_names_and_encodings(folder, name, encoding):
    _images(folder, "a.jpg", "b.jpg")
    (folder / "b.txt").write_text("b")
    words = "caf\u00e9 am Meer" if encoding != "utf-16-le" else "plain words"  # without a mark
    (folder / name).write_bytes(words.encode(encoding))
    assert _listed(folder, captions_needed=True) == ({"a.jpg": words, "b.jpg": "b"}, [])


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "METADATA.CSV"])
@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-16")])
def test_tables_are_read_as_spreadsheets_write_them(folder, name, delimiter, encoding):
    _images(folder, "a.jpg", "sub/b.jpg")
    rows = [
        ("id", "file_name", "text"),
        ("1", "a.jpg", f'"a{delimiter} ""quoted"""'),
        ("2", "sub/b.jpg", '"two\r\nlines"'),
    ]
    (folder / name).write_bytes("\r\n".join(delimiter.join(row) for row in rows).encode(encoding))
    captions, told = _listed(folder)
    assert captions == {"a.jpg": f'a{delimiter.strip()} "quoted"', "sub/b.jpg": "two lines"}
    assert [note.partition(":")[0] for note in told] == ["1 caption of several lines (up to 2), which are joined"]


def test_a_damaged_table_is_named_with_its_line(folder):
    _images(folder, "a.jpg")
    for content, why in (
        (b'file_name,text\na.jpg,"no end\n', "metadata.csv: line 2: unexpected end of data; mend the quotes there"),
        (b"file_name,text\na.jpg,\xff\n", "metadata.csv: not UTF-8; save it as UTF-8"),
        (
            b"file_name,text\na.jpg\n",
            f"1 metadata row not used: {NO_FIELDS.format('file_name and text')}: metadata.csv line 2",
        ),
        (
            b"image,caption\na.jpg,a\n",
            f"1 metadata row not used: {NO_FIELDS.format('file_name and text')}; set data.image_field=image and data.caption_fields=caption",
        ),
    ):
        (folder / "metadata.csv").write_bytes(content)
        captions, told = _listed(folder)
        assert captions == {"a.jpg": ""} and told[0].startswith(why)


def test_a_metadata_in_utf_16_and_a_link_that_leads_out(folder, tmp_path):
    _images(folder, "a.jpg", "b.jpg", "c.jpg")
    (folder / "metadata.jsonl").write_text(_jsonl(_row("a.jpg", "\u00e4")), encoding="utf-16")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "metadata.jsonl").write_text(_jsonl(_row("b.jpg", "secret")))
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "c.txt").symlink_to("c.txt")  # in a circle
    (folder / "sub").mkdir()
    (folder / "sub/metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
    captions, told = _listed(folder)
    assert captions == {
        "a.jpg": "\u00e4",
        "b.jpg": "its caption file is a link that leads out of the folder; put the file itself in it",
        "c.jpg": "",
    }
    assert (
        told[0] == "sub/metadata.jsonl: a link that leads out of the folder is not followed; put the file itself in it"
    )


def test_of_several_caption_files_the_first_with_words_is_taken_and_it_is_told(folder):
    _images(folder, "a.jpg", "b.jpg", "c.jpg")
    for name, words in {"a.txt": "", "a.caption": "a", "b.txt": "b", "b.jpg.txt": "other", "c.txt": "c"}.items():
        (folder / name).write_text(words)
    captions, told = _listed(folder)
    assert captions == {"a.jpg": "a", "b.jpg": "b", "c.jpg": "c"}
    assert told == [
        "2 images with more than one caption file, the first that has words is taken: a.jpg (a.txt, a.caption), b.jpg (b.txt,"
        " b.jpg.txt)"
    ]


def test_files_whose_case_may_mean_another_image_are_not_taken(folder):
    _images(folder, "same.jpg", "Same.jpg", "x.jpg")
    for name in ("same.txt", "X.txt", "x.Txt"):
        (folder / name).write_text(name)
    captions, told = _listed(folder, captions_needed=True)
    assert captions == {"same.jpg": "same.txt", "Same.jpg": NO_CAPTION, "x.jpg": NO_CAPTION}
    assert told == [
        "2 caption files beside no image of that name: X.txt (nearest: x.jpg), x.Txt (nearest: x.jpg)",
        "2 images whose captions were not understood: Same.jpg (same.txt may mean another image), x.jpg (X.txt, x.Txt may mean"
        " another image)",
    ]


def test_no_caption_names_every_way_to_give_one(folder):
    _images(folder, "a.jpg")
    with pytest.raises(DataError) as error:
        slices_of(_data(folder), captions_needed=True)
    for way in (
        "NAME.txt",
        "NAME.caption",
        "NAME.jpg.txt",
        "metadata.jsonl",
        "metadata.csv",
        "metadata.tsv",
        "caption.captioner",
        "data.class_caption",
    ):
        assert way in str(error.value)


def test_all_rows_off_is_said_where_no_image_can_be_used(folder):
    _images(folder, "a.jpg")
    (folder / "metadata.jsonl").write_text(_jsonl(_row("pictures/b.jpg")))
    with pytest.raises(DataError, match="1 rejected: no caption .*1 metadata row not used: its file_name is no image"):
        slices_of(_data(folder), captions_needed=True)


def test_a_captioner_does_not_caption_over_what_was_not_understood(folder):
    """Told with counts and names before anything is made; where no image has a caption nothing is told."""
    _images(folder, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    assert _listed(folder) == (dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg"), ""), [])
    (folder / "a.txt").write_text("a")
    (folder / "b.json").write_text("{}")
    (folder / "cc.txt").write_text("c")
    (folder / "d.txt").write_bytes(b"caf\xe9")
    (folder / "captions.parquet").touch()
    told = _listed(folder)[1]
    assert told == [
        "1 caption file beside no image of that name: cc.txt (nearest: c.jpg)",
        "1 file that may hold captions not read: captions.parquet; captions come from NAME.txt, NAME.caption or NAME.jpg.txt"
        " beside the image, or file_name and text in a metadata.jsonl, metadata.csv or metadata.tsv",
        "1 image whose captions were not understood: b.jpg (b.json is not read)",
        "2 images without a caption that was understood: the captioner's alone will describe them; stop here and mend that if"
        " they should have their own: b.jpg, c.jpg",
    ]
    # left out, not captioned over
    assert _listed(folder)[0]["d.jpg"] == "its caption file is not UTF-8; save it as UTF-8"


def test_whole_or_first_line(folder):
    _images(folder, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    (folder / "a.txt").write_text("\n \u200b\n a  cat \r\nun chat\neine Katze\n")
    (folder / "b.txt").write_text("one line\n")
    (folder / "c.txt").write_text("cat, \u043a\u043e\u0442, \u732b, \u30cd\u30b3, \u0642\u0637")
    (folder / "d.txt").write_text("\u30cd\u30b3\u306e\u5199\u771f (cat)")  # Japanese is written in three of Unicode's
    whole, told = _listed(folder)
    assert whole["a.jpg"] == "\u200b a cat un chat eine Katze" and whole["b.jpg"] == "one line"
    assert told == [
        "1 caption of several lines (up to 3), which are joined: is it one caption? data.caption=first_line takes the first line"
        " alone: a.jpg",
        "1 caption in three scripts or more, as one text in several languages has: is it one caption?"
        " data.caption=first_line takes the first line alone, else keep one language: c.jpg",
    ]
    first, told = _listed(folder, caption="first_line")
    assert first == whole | {"a.jpg": "a cat"} and len(told) == 1
    assert lines_of("a\u2028b\x0bc\n\n") == ["a", "b", "c"] and lines_of(" ") == []
    assert not mixes_languages("caf\u00e9 \u4e2d\u6587") and mixes_languages("a \u0431 \u05d0")


def test_words_with_a_zero_byte_are_not_taken_for_utf_16():
    assert text_encoding(b"a\x00\x1b[2J\r\nb\x07\xc2\x9b") == ("utf-8", 0) and text_encoding(b"") == ("utf-8", 0)
    assert text_encoding("ab\u00e9".encode("utf-16-be")) == ("utf-16-be", 0)


def test_a_shards_digest_does_not_hang_on_the_words_of_a_reject(folder, file_store, monkeypatch):
    def digests():
        made = ingest_folder(file_store, _data(folder), captions_needed=True)
        return [shard.seen.digest for shard in made.values()]

    _images(folder, "a.jpg", "b.jpg")
    (folder / "a.txt").write_text("a")
    before = digests()
    monkeypatch.setattr("sd3core.data.folder_source.NO_CAPTION", "said otherwise")
    assert digests() == before
    (folder / "b.txt").write_text("b")
    assert digests() != before


def test_a_caption_that_is_read_otherwise_gives_another_shard(folder, file_store):
    """So a folder that an earlier version ingested is made again exactly where it had misread one."""
    _images(folder, "a.jpg", "b.jpg")
    (folder / "a.txt").write_text("a\nb")
    (folder / "b.txt").write_text("b")
    digests = [
        [
            made.seen.digest
            for made in ingest_folder(file_store, _data(folder, rows_per_shard=1, caption=caption)).values()
        ]
        for caption in ("whole", "first_line")
    ]
    assert sorted(one == other for one, other in zip(*digests, strict=True)) == [False, True]


def test_many_rows_take_time_in_proportion(folder):
    """Every name is off, so each row goes through all the tables; the nearest name is looked for thrice."""

    def seconds(count: int) -> float:
        names = ImageNames((str(folder),), [f"part{i % 100}/image_{i:07d}.jpg" for i in range(count)])
        rows = "\n".join(json.dumps(_row(f"/elsewhere\\part{i % 100}/image_{i:07d}.jpeg")) for i in range(count))
        (folder / "metadata.jsonl").write_text(rows)
        started = time.perf_counter()
        metadata = read_metadata(folder, ["metadata.jsonl"], names)
        assert metadata.captions == {} and f"and {count - 3:,} more" in metadata.notes[0]
        return time.perf_counter() - started

    seconds(1_000)
    assert seconds(16_000) < 10 * seconds(4_000)  # 16 times, were it in proportion to the square


def test_the_nearest_name_is_looked_for_among_a_bounded_number(monkeypatch):
    seen = []
    monkeypatch.setattr("difflib.get_close_matches", lambda name, others, n: seen.append(len(others)) or [])
    names = ImageNames(("/r",), [f"image_{i:05d}.jpg" for i in range(10 * NEAR)])
    assert names.with_nearest("x", "image_02500x.jpg") == "x" and seen == [2 * NEAR]


def test_a_row_may_have_several_captions_under_the_names_that_the_recipe_gives(folder):
    _images(folder, "a.png", "b.png", "c.png", "d.png")
    rows = [
        {"path": "a.png", "title": "a title", "captions": ["one", "two ", "", "one"]},
        {"path": "b.png", "captions": "alone"},
        {"path": "c.png", "title": None, "captions": [None, ""]},
        {"path": "d.png", "title": "fine", "captions": ["x", 5]},
    ]
    (folder / "metadata.jsonl").write_text(_jsonl(*rows))
    captions, told = _listed(folder, image_field="path", caption_fields=("captions", "title"))
    assert captions == {"a.png": "one | two | a title", "b.png": "alone", "c.png": "", "d.png": ""}
    assert "its captions or title is empty; write it there, or in NAME.txt beside the image" in told[0]
    assert "path and captions or title must be strings, or lists of strings for captions" in told[1]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_tables_columns_are_several_captions(folder, delimiter):
    _images(folder, "a.png", "b.png")
    lines = [["file_name", "short", "long"], ["a.png", "a", "a longer one"], ["b.png", "", '"b, c; d"']]
    (folder / "metadata.csv").write_text("\n".join(delimiter.join(line) for line in lines))
    assert _listed(folder, caption_fields=("long", "short")) == ({"a.png": "a longer one | a", "b.png": "b, c; d"}, [])


def test_several_captions_of_a_folder_are_stored_and_one_changed_makes_one_shard(folder, file_store):
    _images(folder, *(f"{number}.png" for number in range(12)))
    rows = [{"file_name": f"{number}.png", "text": [f"first {number}", f"second {number}"]} for number in range(12)]

    def ingested() -> tuple[dict[str, list[str]], dict[str, bool]]:
        (folder / "metadata.jsonl").write_text(_jsonl(*rows))
        made = ingest_folder(file_store, _data(folder, rows_per_shard=4))
        indexes = [read_shard_index(file_store, "raw", part.record.stem) for part in made.values()]
        stems = {part.record.stem: part.stood for part in made.values()}
        captions = dict(
            pair for index in indexes for pair in zip(index["source"].to_pylist(), captions_column(index), strict=True)
        )
        return captions, stems

    captions, before = ingested()
    assert captions == {row["file_name"]: row["text"] for row in rows}
    rows[5]["text"][1] = "another second 5"
    captions, after = ingested()
    assert captions["5.png"] == ["first 5", "another second 5"]
    assert [stem for stem, stood in after.items() if not stood] == [*(after.keys() - before.keys())]
    assert len(after.keys() - before.keys()) == 1
