"""Ingest on real folders and on the small world: what is taken, what is rejected and why, and what stays stable."""

from __future__ import annotations

import io
import json
import os
import unicodedata

import numpy as np
import pytest
from colour_samples import DISPLAY_P3, profile
from folder_ingest import ingest_folder, read_items, slices_of
from PIL import Image

from sd3core.data.folder_captions import FolderChanged
from sd3core.data.folder_listing import holds_nothing
from sd3core.data.folder_source import NO_CAPTION, image_key
from sd3core.data.images import CONVERTED, TRANSPARENT, UNKNOWN_COLOURS, PixelRules, decode_image
from sd3core.data.ingest import SceneWorker, list_scenes
from sd3core.data.ingest_folder import HELD_OUT_ROWS, FolderWorker
from sd3core.data.shards import is_held_out, read_samples, read_shard_index, shard_stem
from sd3core.errors import DataError
from sd3core.recipe import Data
from sd3core.words import cut_at_word, one_line

RNG = np.random.default_rng(0)


def _image(size=(48, 40)) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def _save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or _image()).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def _data(folder, **changes) -> Data:
    return Data(
        **{"name": "pictures", "source": "folder", "folder": str(folder), "rows_per_shard": 4, "held_out_fraction": 0.5}
        | changes
    )


def _ingest(store, data, captions_needed=False, folder="raw"):
    """Rows by source path, failed reasons by name, and files by key."""
    rows, failed, files = {}, {}, {}
    for made in ingest_folder(store, data, captions_needed, folder).values():
        record = made.record
        failed |= {row.key: row.reason for row in record.failed}
        rows |= {row["source"]: row for row in read_shard_index(store, folder, record.stem).to_pylist()}
        files |= dict(read_samples(store.get(f"{folder}/{record.stem}.tar")))
    return rows, failed, files


def test_images_are_kept_as_they_are_with_their_captions(folder, file_store):
    _save(folder / "a.jpg")
    _save(folder / "a.png")  # the same stem
    _save(folder / "sub/a.webp")
    _save(folder / "scan.TIF")
    (folder / "a.txt").write_text("both are called a\n")
    (folder / "sub/a.txt").write_bytes("\ufeffеж и 猫 \U0001f994".encode())
    rows, failed, files = _ingest(file_store, _data(folder))
    assert failed == {} and sorted(rows) == ["a.jpg", "a.png", "scan.TIF", "sub/a.webp"]
    assert rows["a.jpg"]["caption"] == rows["a.png"]["caption"] == "both are called a"
    assert rows["sub/a.webp"]["caption"] == "еж и 猫 \U0001f994" and rows["scan.TIF"]["caption"] == ""
    assert len({row["key"] for row in rows.values()}) == 4 and all("." not in row["key"] for row in rows.values())
    for name, extension in (("a.jpg", "jpg"), ("a.png", "png"), ("sub/a.webp", "webp")):
        assert files[rows[name]["key"]][extension] == (folder / name).read_bytes()
    scanned = decode_image(files[rows["scan.TIF"]["key"]]["png"], PixelRules(10**6))
    np.testing.assert_array_equal(np.asarray(scanned), np.asarray(Image.open(folder / "scan.TIF")))
    for row in rows.values():
        about = json.loads(files[row["key"]]["json"])
        assert about == {name: row[name] for name in ("caption", "width", "height", "source")}
        assert (row["width"], row["height"]) == (48, 40)
        assert row["split"] == ("held_out" if is_held_out(row["key"], 0.5) else "train")


def test_colours_are_made_srgb_once_whatever_a_file_is_stored_as(folder, file_store):
    """What is stored as it is keeps its profile; what becomes a PNG is sRGB then, and has none."""
    across, down = np.meshgrid(np.arange(40, 200, 4), np.arange(200, 40, -4))
    gradient = Image.fromarray(np.stack([across, down, np.full_like(across, 90)], -1).astype(np.uint8))
    p3 = profile(DISPLAY_P3)
    see_through = gradient.convert("RGBA")
    see_through.putalpha(128)
    _save(folder / "a.png", gradient, icc_profile=p3)
    _save(folder / "b.tif", gradient, icc_profile=p3)
    _save(folder / "c.avif", gradient, icc_profile=p3, quality=100, subsampling="4:4:4")
    _save(folder / "d.tif", see_through, icc_profile=p3)
    _save(folder / "e.png", gradient, icc_profile=b"no profile")
    data = _data(folder, rows_per_shard=9, background="#102030")
    record = ingest_folder(file_store, data)[0].record
    assert record.extra == {CONVERTED: 4, TRANSPARENT: 1, UNKNOWN_COLOURS: 1, HELD_OUT_ROWS: 3}
    rows = {row["source"]: row for row in read_shard_index(file_store, "raw", record.stem).to_pylist()}
    files = dict(read_samples(file_store.get(f"raw/{record.stem}.tar")))
    rules = PixelRules.of(data)
    for name in rows:
        stored = files[rows[name]["key"]]["png"]
        wanted = decode_image((folder / name).read_bytes(), rules)
        np.testing.assert_array_equal(np.asarray(decode_image(stored, rules)), np.asarray(wanted))
        assert ("icc_profile" in Image.open(io.BytesIO(stored)).info) == name.endswith(".png")


def test_size_is_that_of_the_upright_image(folder, file_store):
    exif = Image.Exif()
    exif[0x0112] = 6
    _save(folder / "turned.jpg", exif=exif.tobytes())
    rows, _, _ = _ingest(file_store, _data(folder))
    assert (rows["turned.jpg"]["width"], rows["turned.jpg"]["height"]) == (40, 48)


def test_every_reject_is_named_with_its_reason(folder, file_store, tmp_path):
    _save(folder / "good.png")
    (folder / "good.txt").write_text("good")
    _save(folder / "plain.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:500])
    _save(folder / "small.png", _image((31, 90)))
    _save(folder / "large.png", _image((90, 90)))
    _save(folder / "film.gif", save_all=True, append_images=[_image()])
    _save(folder / "latin.png")
    for name in ("empty", "text", "drawing", "cut", "small", "large", "film"):
        (folder / f"{name}.txt").write_text("x")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    outside = _save(tmp_path / "outside/secret.png")
    (folder / "link.png").symlink_to(outside)
    (folder / "linked").symlink_to(outside.parent)
    (folder / "inner.png").symlink_to("good.png")
    (folder / "inner.txt").write_text("a link inside is fine")
    (folder / "dangling.png").symlink_to("nowhere.png")
    _save(folder / ".hidden.png")
    _save(folder / ".cache/x.png")
    (folder / "notes.md").write_text("ignored")
    rows, failed, _ = _ingest(file_store, _data(folder, max_image_pixels=8000), captions_needed=True)
    assert sorted(rows) == ["good.png", "inner.png"]
    assert failed == {
        "plain.png": NO_CAPTION,
        "empty.jpg": "empty file",
        "text.jpg": "not an image that can be read (save it as JPEG or PNG)",
        "drawing.svg": "not an image that can be read (save it as JPEG or PNG)",
        "cut.png": "truncated or damaged image",
        "small.png": "a side is shorter than 32 px (data.min_side_px)",
        "large.png": "more than 8,000 pixels (data.max_image_pixels)",
        "film.gif": "animated, or several pictures in one file; save the one you want as a file of its own",
        "latin.png": "its caption file is not UTF-8; save it as UTF-8",
        "link.png": "a link that leads out of the folder is not followed; put the file itself in it",
        "linked": "a linked folder is not followed; put the images themselves in it",
        "dangling.png": "not a regular file",
    }


def test_nothing_is_what_has_neither_an_image_nor_a_reason(folder, tmp_path):
    (folder / "words.txt").write_text("no picture")
    (folder / ".hidden.png").touch()
    (folder / "inner").mkdir()
    assert holds_nothing(folder)
    (folder / "inner" / "a.PNG").touch()  # whether it can be read is ingest's to say
    assert not holds_nothing(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").symlink_to(folder)  # not followed, and ingest says so
    assert not holds_nothing(elsewhere)


@pytest.mark.parametrize("content, why", [
    ({}, "it holds no image file"),
    ({"a.jpg": b"", "b.jpg": b"x", "c.jpg": b"y"}, "2 rejected: not an image that can be read (save it as JPEG or PNG); 1 rejected: empty file"),
])  # fmt: skip
def test_a_folder_without_a_usable_image_is_an_error_of_one_line(folder, content, why):
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        slices_of(_data(folder))
    assert str(error.value) == f"data.folder {folder}: no usable image ({why}); name another folder, or mend that"
    with pytest.raises(DataError, match="no such folder"):
        slices_of(_data(folder / "nowhere"))


def test_all_without_caption_is_an_error_where_captions_are_needed(folder):
    _save(folder / "a.png")
    assert slices_of(_data(folder))
    with pytest.raises(DataError, match="1 rejected: no caption"):
        slices_of(_data(folder), captions_needed=True)


def test_shards_are_named_by_content(folder, file_store, tmp_path):
    """One image more, wherever it sorts, or another caption: one shard; a renamed image: two, where none splits."""

    def digests(place=folder):
        made = ingest_folder(file_store, _data(place, rows_per_shard=7))
        return {number: shard.seen.digest for number, shard in made.items()}

    def differ(before, after):
        return {number for number in before | after if before.get(number) != after.get(number)}

    for number in range(14):
        _save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"caption {number}")
    slices = slices_of(_data(folder, rows_per_shard=7))
    assert {part.number: len(part.lines) for part in slices} == {1: 5, 5: 7, 6: 2}
    first = digests()
    assert digests() == first
    _save(folder / "0.png")
    grown = digests()
    assert len(differ(first, grown)) == 1 and grown.keys() == first.keys()
    (folder / "005.txt").write_text("another caption")
    changed = digests()
    assert len(differ(grown, changed)) == 1
    (folder / "003.png").rename(folder / "renamed.png")
    assert len(differ(changed, digests())) == 2 and digests().keys() == changed.keys()
    (folder / "renamed.png").rename(folder / "003.png")
    folder.rename(tmp_path / "moved")
    assert digests(tmp_path / "moved") == changed


def test_a_file_that_changes_after_the_listing_fails_its_shard(folder, file_store):
    _save(folder / "a.png")
    (folder / "a.txt").write_text("a")
    (part,) = slices_of(_data(folder))
    worker = FolderWorker(_data(folder), file_store.url, "raw", captions_needed=False)
    _save(folder / "a.png")
    with pytest.raises(FolderChanged, match="a.png changed since"):
        worker(part)
    (folder / "a.png").unlink()
    with pytest.raises(FolderChanged, match="a.png changed since"):
        worker(part)
    _save(folder / "a.png")
    (part,) = slices_of(_data(folder))
    (folder / "a.txt").write_text("another")
    with pytest.raises(FolderChanged, match="a.txt changed since"):
        worker(part)
    assert file_store.list() == []


def test_file_names_that_are_not_utf8(folder, file_store):
    name = os.fsencode(str(folder)) + b"/caf\xe9.png"
    sink = io.BytesIO()
    _image().save(sink, "PNG")
    with open(name, "wb") as file:
        file.write(sink.getvalue())
    rows, _, _ = _ingest(file_store, _data(folder))
    assert list(rows) == ["caf\\xe9.png"]


def test_files_that_may_not_be_read_are_named_and_the_others_go_on(folder, file_store, monkeypatch):
    for name in ("good", "shut", "caption"):
        _save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    (folder / "metadata.jsonl").write_text("")
    shut = {"shut.png", "caption.txt", "metadata.jsonl"}
    opened = type(folder).open

    def refused(path, *arguments, **options):
        if path.name in shut:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(type(folder), "open", refused)  # file modes do not stop root
    rows, failed, _ = _ingest(file_store, _data(folder))
    why = "cannot be read: Permission denied; give this user the right to it"
    assert sorted(rows) == ["good.png"] and failed == dict.fromkeys(("shut.png", "caption.png"), why)
    told = read_items(_data(folder))[1]
    assert told == [f"metadata.jsonl: {why}"]


def test_one_pixel_and_images_of_20_000_px(folder, file_store):
    """400 million pixels are refused by the file's header; 20,000 x 40 of them are an image like any other."""
    _save(folder / "pixel.png", Image.new("RGB", (1, 1)))
    _save(folder / "huge.png", Image.new("1", (20_000, 20_000)))
    _save(folder / "long.png", Image.new("RGB", (20_000, 40)))
    rows, failed, _ = _ingest(file_store, _data(folder))
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == {"long.png": (20_000, 40)}
    assert failed == {
        "pixel.png": "a side is shorter than 32 px (data.min_side_px)",
        "huge.png": "more than 100,000,000 pixels (data.max_image_pixels)",
    }


def test_files_of_one_name_stay_apart(folder, file_store):
    """Two kinds share the caption beside them; the same name in another folder is another image with its own."""
    for name in ("same.jpg", "same.png", "sub/same.jpg", "sub/deeper/same.jpg", "Same.jpg"):
        _save(folder / name)
    (folder / "same.txt").write_text("above")
    (folder / "sub/same.txt").write_text("below")
    rows, failed, _ = _ingest(file_store, _data(folder))
    assert failed == {}
    assert {name: row["caption"] for name, row in rows.items()} == {
        "same.jpg": "above",
        "same.png": "above",
        "sub/same.jpg": "below",
        "sub/deeper/same.jpg": "",
        "Same.jpg": "",
    }
    assert len({row["key"].lower() for row in rows.values()}) == 5


def test_captions_of_every_kind(folder, file_store):
    """Too long is cut and said, nothing and what shows nothing is no caption, any script is kept to the byte."""
    kept = {
        "hebrew": "\u05e7\u05d5\u05e3 \u200f\u05e9\u05dc\u05d5\u05dd",
        "arabic": "\u0642\u0631\u062f \u0639\u0644\u0649",
        "hindi": "\u0939\u093f\u0928\u094d\u0926\u0940",
        "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
        "zalgo": "Z\u0351\u036b\u0343a\u0329l\u0348",
    }
    texts = kept | {
        "long": "word " * 2_000,
        "controls": "a\x00\x1b[2J\r\nb\x07\x9b",
        "nothing": "",
        "spaces": " \t\u3000\n",
        "invisible": "\u200b\u200d\ufeff\u202e\x00",
    }
    for name, text in texts.items():
        _save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(text.encode())
    rows, failed, files = _ingest(file_store, _data(folder), captions_needed=True)
    captions = {name.removesuffix(".png"): row["caption"] for name, row in rows.items()}
    assert captions == kept | {"long": ("word " * 400).strip(), "controls": "a[2J b"}
    assert failed == {f"{name}.png ({name}.txt is empty)": NO_CAPTION for name in ("nothing", "spaces", "invisible")}
    for row in rows.values():
        assert json.loads(files[row["key"]]["json"])["caption"] == row["caption"]
    cut = {item.name for item in read_items(_data(folder))[0] if item.cut}
    assert cut == {"long.png"}


def test_keys():
    paths = [
        "a.jpg",
        "a.png",
        "a/b.jpg",
        "a_b.jpg",
        "a.b.jpg",
        "猫.jpg",
        "犬.jpg",
        "x" * 240 + ".jpg",
        "x" * 241 + ".jpg",
        "A.jpg",
    ]
    keys = [image_key(path) for path in paths]
    assert len({key.lower() for key in keys}) == len(keys)
    assert all(
        key.isascii() and len(key) < 90 and set(key.lower()) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
        for key in keys
    )


def test_captions_are_one_clean_line():
    assert one_line("  a\tb\r\n c\x00\x1b[31m\x7f d\u2028e ") == "a b c[31m d e"
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # joined by zero-width joiners, which mean something
    assert one_line(family) == family and one_line("می\u200cخواهم") == "می\u200cخواهم"
    assert not any(unicodedata.category(c) == "Cc" for c in one_line("".join(map(chr, range(300)))))


def test_long_captions_are_cut_at_a_word():
    assert cut_at_word("one two three", 9) == "one two" and cut_at_word("one two three", 7) == "one two"
    assert cut_at_word("unbroken" * 4, 10) == "unbrokenun" and cut_at_word("猫" * 30, 10) == "猫" * 10
    assert cut_at_word("one two three", 99) == "one two three"


WORLD = Data(
    name="world",
    source="small_world",
    images=10,
    image_side_px=64,
    aspect_ratios=(1.0, 0.75, 1.3333),
    rows_per_shard=4,
    held_out_fraction=0.3,
)


def test_small_world(file_store):
    shards = list_scenes(WORLD, 3)
    assert [(shard.number, list(shard.scenes)) for shard in shards] == [
        (0, [0, 1, 2, 3]),
        (1, [4, 5, 6, 7]),
        (2, [8, 9]),
    ]
    rows, failed, files = {}, [], {}
    for shard in shards:
        record = SceneWorker(WORLD, file_store.url, "raw")(shard)
        failed += record.failed
        rows |= {row["key"]: row for row in read_shard_index(file_store, "raw", record.stem).to_pylist()}
        files |= dict(read_samples(file_store.get(f"raw/{record.stem}.tar")))
        assert SceneWorker(WORLD, file_store.url, "again")(shard).digest == record.digest
    assert len(rows) == 10 and failed == [] and len({row["width"] for row in rows.values()}) > 1
    for key, row in rows.items():
        image = decode_image(files[key]["png"], PixelRules(10**6))
        assert image.size == (row["width"], row["height"]) and abs(image.width * image.height - 64 * 64) < 400
        assert row["caption"] and row["source"] == "small_world"


def test_small_world_shards_are_named_by_seed_settings_and_range():
    base = [shard.digest for shard in list_scenes(WORLD, 0)]
    grown = [shard.digest for shard in list_scenes(WORLD.model_copy(update={"images": 15}), 0)]
    assert grown[:2] == base[:2] and grown[2] != base[2] and len(grown) == 4
    for seed, change in [(1, {}), (0, {"max_objects": 2}), (0, {"image_side_px": 96})]:
        assert not set(base) & {shard.digest for shard in list_scenes(WORLD.model_copy(update=change), seed)}
    assert shard_stem(7, base[0]) == f"00007.{base[0]}"
