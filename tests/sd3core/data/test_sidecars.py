"""What tools and network drives leave in a folder is not taken for images, is told in a line, and nothing else goes with it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from folder_ingest import ingest_folder, read_items, slices_of
from PIL import Image

from sd3core.data import folder_listing
from sd3core.data.folder_listing import list_folder
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.image_files.sidecars import beside_images, is_of_tools
from sd3core.errors import DataError
from sd3core.recipe import Data

LEFT = [
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.png",
    "sub/@eaDir/SYNO.png",
    "#recycle/old.png",
    "lost+found/1.png",
    "$RECYCLE.BIN/b.png",
    "__MACOSX/sub/a.png",
    "a_mask.png",
    "a-masklabel.png",
    "sub/b_thumb.webp",
]
HIDDEN = ["._a.png", ".thumbnails/x.png", ".AppleDouble/a.png", ".Trash-1000/files/a.png", "sub/._b.jpg"]
OTHERS = ["Thumbs.db", ".DS_Store", "sub/desktop.ini", ".git/config"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def _write(folder: Path, *names: str) -> None:
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 40), (shade, 0, 0)).save(folder / name, "PNG")


def _data(folder: Path, **changes) -> Data:
    return Data(name="pictures", source="folder", folder=str(folder), **changes)


def _listed(folder: Path, **changes) -> tuple[set[str], list[str]]:
    """The images, and what was told."""
    items, told = read_items(_data(folder, **changes))
    assert not any(item.problem for item in items)
    return {item.name for item in items}, told


def test_only_images_are_taken_and_the_rest_is_counted_in_one_line(folder, file_store):
    _write(folder, "a.png", "sub/b.jpg", *LEFT, *HIDDEN)
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    images, told = _listed(folder)
    assert images == {"a.png", "sub/b.jpg"}
    assert told == [
        "14 left by tools and not taken for images: 6 in folders of tools or drives (#recycle/old.png,"
        " $RECYCLE.BIN/b.png, @eaDir/a.png/SYNOPHOTO_THUMB_M.png and 3 more), 3 as mask or thumbnail of an image"
        " beside it (a-masklabel.png, a_mask.png, sub/b_thumb.webp), 5 hidden (.AppleDouble, .Trash-1000, ._a.png and 2"
        " more); data.sidecars=take takes them, but what is hidden"
    ]
    made = ingest_folder(file_store, _data(folder))
    assert sum(part.record.rows for part in made.values()) == 2 and not any(p.record.failed for p in made.values())

    images, told = _listed(folder, sidecars="take")
    assert images == {"a.png", "sub/b.jpg", *LEFT}
    assert told == [
        "5 left by tools and not taken for images: 5 hidden (.AppleDouble, .Trash-1000, ._a.png and 2 more)"
    ]


def test_a_folder_without_any_is_told_nothing(folder):
    _write(folder, "a.png", "masks/a.png", ".git/a.png")
    assert _listed(folder) == ({"a.png", "masks/a.png"}, [])


@pytest.mark.parametrize("names", [
    ["mask.png", "_mask.png", "1_mask.png", "2_mask.png"],  # pictures that are all called so
    ["a_mask.png", "sub/a.png"],  # of another folder
    ["party.png", "party-masked.png", "party mask.png", "unmask.png"],
    ["eaDir/a.png", "recycle/b.png", "lost and found/c.png"],
])  # fmt: skip
def test_pictures_that_are_only_called_so_are_taken(folder, names):
    _write(folder, *names)
    assert _listed(folder) == ({*names}, [])


@pytest.mark.parametrize("given", ["text file", "text file of its whole name", "row"])
def test_what_somebody_captioned_is_an_image(folder, given):
    _write(folder, "a.png", "a_mask.png", "b.png", "b_mask.png")
    if given == "row":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a_mask.png", "text": "a mask"}))
    else:
        (folder / ("a_mask.txt" if given == "text file" else "a_mask.png.txt")).write_text("a mask")
    images, told = _listed(folder)
    assert images == {"a.png", "a_mask.png", "b.png"}
    assert told[0].startswith("1 left by tools and not taken for images: 1 as mask or thumbnail")


def test_a_class_caption_is_no_words_of_its_own(folder):
    _write(folder, "cat/a.png", "cat/a_mask.png", "@eaDir/cat/a.png")
    images, told = _listed(folder, class_caption="a {class}")
    assert images == {"cat/a.png"} and told[1:] == ["captions by 1 class folder: 'a cat'"]


def test_captions_of_images_are_not_looked_for_among_thumbnails(folder):
    """A row that names an absolute path of another machine means the image, not its thumbnail."""
    _write(folder, "photos/a.png", "@eaDir/a.png", "#recycle/a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "/volume1/photos/a.png", "text": "words"}))
    items, told = read_items(_data(folder))
    assert [item.captions for item in items] == [("words",)] and len(told) == 1


def test_a_folder_of_the_drive_that_may_not_be_read_stops_nobody(folder, monkeypatch):
    """lost+found is root's. (Tests may run as root, so the refusal is made up.)"""
    _write(folder, "a.png", "lost+found/1.png", "mine/b.png")
    scandir = folder_listing.os.scandir

    def refusing(path):
        if str(path).rstrip("/").endswith(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_listing.os, "scandir", refusing)
    refused = "lost+found"
    assert _listed(folder)[0] == {"a.png", "mine/b.png"}
    refused = "mine"
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        _listed(folder)


def test_what_was_ingested_before_there_was_the_rule_stands(folder):
    """The digest of a listing, by which an unchanged folder is not looked at again, is of all that it has."""
    _write(folder, "a.png", "a_mask.png", "@eaDir/a.png", "._a.png")
    digests = {ListedFolder(_data(folder, sidecars=value)).digest for value in ("skip", "take")}
    assert len(digests) == 1
    (folder / "._a.png").unlink()
    assert list_folder(str(folder)).digest in digests
    (folder / "a_mask.png").unlink()
    assert list_folder(str(folder)).digest not in digests


def test_a_folder_that_holds_nothing_else_is_an_error_that_tells_it(folder):
    _write(folder, "@eaDir/a.png")
    with pytest.raises(DataError, match="no usable image .*1 left by tools and not taken for images: 1 in folders"):
        slices_of(_data(folder))


def test_many_images_take_time_in_proportion():
    names = [f"{number}{end}" for number in range(100_000) for end in (".jpg", "_mask.png")]
    began = time.process_time()
    assert len(beside_images(names, lambda name: False)) == 100_000
    assert beside_images(names, lambda name: True) == set()
    assert time.process_time() - began < 5


def test_names_of_folders_are_known_in_any_case():
    assert all(map(is_of_tools, ("@eaDir", "@EADIR", "System Volume Information", ".Trash-1000", ".thumbnails")))
    assert not any(map(is_of_tools, ("eaDir", "trash-1000", "recycle", ".git", "")))
