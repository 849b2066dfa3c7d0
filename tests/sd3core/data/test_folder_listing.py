"""What a walk finds of a folder, and what it holds of each file: a million must fit the machine that lists them."""

from __future__ import annotations

import os
import tracemalloc

import pytest

from sd3core.data.folder_captions import FolderCaptions, ListedFile, ListedImage
from sd3core.data.folder_listing import LINK_OUT, LINKED_FOLDER, FolderListing, list_folder
from sd3core.data.folder_source import deal_folder
from sd3core.errors import DataError

LONG_AGO_S = 1_700_000_000


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def write(path, content: str, at: float = LONG_AGO_S) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    os.utime(path, (at, at))


def dealt(listing: FolderListing, rows: int = 4):
    return deal_folder(listing, FolderCaptions(listing.root, str(listing.root), listing.files()), rows)


def test_names_sizes_and_times_are_listed_by_folder(folder):
    for name in (
        "b.jpg",
        "a.png",
        "sub/c.webp",
        "sub/c.txt",
        "A.JPG",
        "notes.md",
        "other.bin",
        ".hidden.jpg",
        ".git/x.jpg",
    ):
        write(folder / name, name)
    listing = list_folder(str(folder))
    assert [file.path for file in listing.images()] == ["A.JPG", "a.png", "b.jpg", "sub/c.webp"]
    assert listing.files().captions == {"sub/c.txt": ListedFile("sub/c.txt", 9, LONG_AGO_S * 10**9)}
    assert listing.files().unread == ["notes.md"] and not list(listing.problems()) and listing.at_rest
    os.utime(folder / "b.jpg")
    assert not list_folder(str(folder)).at_rest
    with pytest.raises(DataError, match="no such folder"):
        list_folder(str(folder / "nowhere"))


def test_links_out_of_the_folder_are_not_followed_and_told_by_what_they_were_to_be(folder, tmp_path):
    write(tmp_path / "outside" / "x.jpg", "secret")
    write(tmp_path / "outside" / "metadata.jsonl", "{}")
    for name in ("a.jpg", "metadata.jsonl", "captions.parquet", "a.txt"):
        (folder / name).symlink_to(tmp_path / "outside" / ("x.jpg" if name != "metadata.jsonl" else name))
    (folder / "sub").symlink_to(tmp_path / "outside")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    listing = list_folder(str(folder))
    assert not list(listing.images()) and not listing.files().metadata
    assert dict(listing.problems()) == {"sub": LINKED_FOLDER, "a.jpg": LINK_OUT, "circle.jpg": "not a regular file"}
    assert listing.notes() == [f"metadata.jsonl: {LINK_OUT}"]
    assert listing.files().unread == ["captions.parquet"] and list(listing.files().captions) == ["a.txt"]


@pytest.mark.parametrize("change", ["size", "time", "name", "gone", "caption", "folder", "link", "unread"])
def test_any_change_of_a_name_size_or_time_is_another_digest(folder, change):
    for name in ("a.jpg", "a.txt", "sub/b.jpg", "c.json"):
        write(folder / name, "x")
    before = list_folder(str(folder)).digest
    assert list_folder(str(folder)).digest == before
    if change == "size":
        write(folder / "a.jpg", "xx")
    elif change == "time":
        write(folder / "a.jpg", "x", LONG_AGO_S + 1)
    elif change == "name":
        (folder / "a.jpg").rename(folder / "aa.jpg")
    elif change == "gone":
        (folder / "a.jpg").unlink()
    elif change == "caption":
        write(folder / "a.txt", "x", LONG_AGO_S + 1)
    elif change == "folder":
        (folder / "sub").rename(folder / "other")
    elif change == "link":
        (folder / "sub" / "linked").symlink_to(folder)
    else:
        write(folder / "d.json", "x")
    assert list_folder(str(folder)).digest != before


def test_a_slice_is_another_where_one_of_its_files_is(folder):
    for number in range(20):
        write(folder / f"{number}.jpg", "x")
        write(folder / f"{number}.txt", "words")
    before = {part.number: part.seen for part in dealt(list_folder(str(folder)))}
    write(folder / "7.txt", "other words")
    after = {part.number: part.seen for part in dealt(list_folder(str(folder)))}
    assert before.keys() == after.keys() and len([n for n in before if before[n] != after[n]]) == 1


@pytest.mark.parametrize("image", [
    ListedImage(ListedFile("a/b.jpg", 5, 7), (ListedFile("a/b.txt", 1, 2), ListedFile("a/b.caption", 3, 4)), hint="why"),
    ListedImage(ListedFile("caf\udce9.jpg", 5, 7), texts=("\u732b \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),)),
    ListedImage(ListedFile("a.jpg", 5, 7), texts=("one", "two")),
    ListedImage(ListedFile("a", 0, 0), problem="a linked folder"),
])  # fmt: skip
def test_a_line_says_all_of_an_image(image):
    assert ListedImage.of_line(image.line()) == image
    other = image._replace(file=image.file._replace(size=99))
    assert other.words_key == image.words_key and other.line() != image.line()
    assert image._replace(texts=("other",)).words_key != image.words_key


def test_a_line_and_its_words_are_told_as_before_there_were_several():
    """Golden: what stands of a folder that was ingested then is compared with them."""
    file = ListedFile("a.jpg", 5, 7)
    assert ListedImage(file, texts=("words",)).line() == '[["a.jpg", 5, 7], [], "words", "", ""]'
    beside = ListedImage(file, (ListedFile("a.txt", 1, 2),), hint="why")
    assert beside.line() == '[["a.jpg", 5, 7], [["a.txt", 1, 2]], "", "why", ""]'
    assert beside.words_key == '[[["a.txt", 1, 2]], "", "why"]'


def test_an_empty_folder_has_no_slices(folder):
    assert dealt(list_folder(str(folder))) == []


def test_of_a_file_little_more_than_its_name_is_held(folder):
    """So that the driver holds 1,000,000 files in less than 100 MB."""
    count = 4_000
    for number in range(count):
        path = folder / f"part{number // 1_000}" / f"image_{number:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    tracemalloc.start()
    listing = list_folder(str(folder))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(listing.images())) == count and held / count < 60
