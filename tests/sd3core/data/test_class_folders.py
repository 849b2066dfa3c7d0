"""Class folders: which folder is an image's class, the words of its name, and what is told of images that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folder_ingest import ingest_folder, read_items, slices_of
from source_files import put_images

from sd3core.data.image_files.class_folders import OUTSIDE, UNNAMED, ClassFolders, read_class_names
from sd3core.data.image_files.listed_folder import ListedFolder
from sd3core.data.ingest import captions_column
from sd3core.data.shards import read_shard_index
from sd3core.errors import DataError
from sd3core.recipe import Data

PHOTO = "a photo of a {class}"
NAMES = {"n01440764": ["tench", "Tinca tinca"], "n02099601": "golden retriever"}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


def _data(folder: Path, **changes) -> Data:
    changes = {"class_caption": PHOTO} | changes
    return Data(name="pictures", source="folder", folder=str(folder), **changes)


def _listed(folder: Path, captions_needed=True, **changes) -> tuple[dict[str, str], list[str]]:
    """Captions by image, or why it is not taken, and what was told."""
    items, told = read_items(_data(folder, **changes), captions_needed)
    return {item.name: item.problem or " | ".join(item.captions) for item in items}, told


def test_a_class_is_the_folder_that_an_image_lies_in(folder):
    put_images(folder, "cat/1.png", "sea_lion/2.png", "train/polar__bear/3.png", "out.png", "cat/4.png", "cat/5.png")
    (folder / "cat/4.txt").write_text("a cat of its own")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "cat/5.png", "text": "by its row"}))
    captions, told = _listed(folder)
    assert captions == {
        "cat/1.png": "a photo of a cat",
        "sea_lion/2.png": "a photo of a sea lion",
        "train/polar__bear/3.png": "a photo of a polar bear",
        "out.png": OUTSIDE,
        "cat/4.png": "a cat of its own",
        "cat/5.png": "by its row",
    }
    shown = "'a photo of a cat', 'a photo of a polar bear', 'a photo of a sea lion'"
    assert told == [f"captions by 3 class folders: {shown}"]


def test_a_file_gives_each_name_its_words_and_what_it_lacks_is_counted(folder, tmp_path):
    put_images(folder, "n01440764/a.png", "n02099601/b/c.png", "n00000000/d.png", "n00000000/e.png", "f.png")
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    captions, told = _listed(folder, class_names=str(tmp_path / "names.json"))
    assert captions == {
        "n01440764/a.png": "a photo of a tench | a photo of a Tinca tinca",
        "n02099601/b/c.png": "a photo of a golden retriever",
        "n00000000/d.png": UNNAMED,
        "n00000000/e.png": UNNAMED,
        "f.png": OUTSIDE,
    }
    assert told[1] == f"data.class_names {tmp_path}/names.json lacks 1 folder: n00000000 (2 images)"


def test_with_a_captioner_an_image_of_no_class_goes_on_and_it_is_told(folder):
    put_images(folder, "cat/1.png", "out.png")
    captions, told = _listed(folder, captions_needed=False)
    assert captions == {"cat/1.png": "a photo of a cat", "out.png": ""}
    assert f"1 image whose captions were not understood: out.png ({OUTSIDE})" in told


def test_counts_add_up_and_every_reason_is_told(folder, file_store, tmp_path):
    put_images(folder, "n01440764/a.png", "n00000000/d.png", "f.png", "g.png")
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    made = ingest_folder(file_store, _data(folder, class_names=str(tmp_path / "names.json")), captions_needed=True)
    (part,) = made.values()
    index = read_shard_index(file_store, "raw", part.record.stem)
    assert captions_column(index) == [["a photo of a tench", "a photo of a Tinca tinca"]]
    assert sorted((row.key, row.reason) for row in part.record.failed) == [
        ("f.png", OUTSIDE),
        ("g.png", OUTSIDE),
        ("n00000000/d.png", UNNAMED),
    ]
    with pytest.raises(DataError, match=f"no usable image .*2 rejected: {OUTSIDE.replace('(', '.').replace(')', '.')}"):
        (folder / "n01440764/a.png").unlink()
        slices_of(_data(folder, class_names=str(tmp_path / "names.json")), captions_needed=True)


@pytest.mark.parametrize(("name", "text"), [
    ("n.json", json.dumps(NAMES)),
    ("n.yaml", "n01440764: [tench, Tinca tinca]\nn02099601: golden retriever\n"),
    ("n.yml", "n01440764:\n- tench\n- Tinca tinca\nn02099601: ' golden  retriever'\n"),
    ("n.csv", "n01440764,tench,Tinca tinca\r\n\r\nn02099601,golden retriever,\r\n"),
    ("n.tsv", "n01440764\ttench\tTinca tinca\nn02099601\tgolden retriever"),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_are_read_from_files_of_these_kinds(tmp_path, name, text, encoding):
    (tmp_path / name).write_text(text, encoding=encoding)
    read = read_class_names(str(tmp_path / name))
    assert read == {"n01440764": ("tench", "Tinca tinca"), "n02099601": ("golden retriever",)}


@pytest.mark.parametrize(("name", "text", "words"), [
    ("n.json", '{"a": "x", "a": "y"}', "'a' stands twice; keep one, with all its words"),
    ("n.csv", "a,x\nb,y\na,z", "'a' stands twice"),
    ("n.yaml", "a: x\na: y", "the key 'a' stands twice; keep one of them"),
    ("n.yaml", "001: x", "the folder 1 is no text; put it in quotes"),
    ("n.yaml", "a: 5", "the words of 'a' are no text or list of texts; put them in quotes"),
    ("n.json", '{"a": {"b": "c"}}', "the words of 'a' are no text or list of texts"),
    ("n.csv", "a,\n", "'a' has no word; give it one, or take it out"),
    ("n.json", "{}", "it names no folder; give it as a .yaml or .json of FOLDER: WORD"),
    ("n.json", '["a"]', "cannot be read (not an object); give it as"),
    ("n.yaml", "- a", "cannot be read (not a mapping); give it as"),
    ("n.json", '{"a": ', "cannot be read ("),
    ("n.csv", 'a,"x', "cannot be read ("),
    ("n.txt", "a x", "cannot be read (of another kind: .txt); give it as"),
    ("n.json", b'{"a": "\xff"}', "not UTF-8; save it as UTF-8"),
])  # fmt: skip
def test_a_file_of_names_that_cannot_be_used_is_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        read_class_names(str(tmp_path / name))
    assert str(caught.value).startswith(f"data.class_names {tmp_path / name}: ") and words in str(caught.value)
    with pytest.raises(DataError, match="data.class_names /nowhere/n.json: No such file or directory; name another"):
        read_class_names("/nowhere/n.json")


def test_other_words_are_another_digest_of_the_folder(folder, tmp_path):
    put_images(folder, "n01440764/a.png")
    names = tmp_path / "names.json"
    names.write_text(json.dumps(NAMES))
    data = _data(folder, class_names=str(names))
    before = ListedFolder(data).digest
    assert ListedFolder(data).digest == before != ListedFolder(_data(folder)).digest
    names.write_text(json.dumps(NAMES | {"n01440764": "tench"}))
    assert ListedFolder(data).digest != before
    plain = ListedFolder(_data(folder, class_caption=None))
    assert plain.digest == plain.listing.digest == ListedFolder(_data(folder)).digest


def test_a_word_with_braces_stands_as_it_is():
    assert ClassFolders(PHOTO, {"a": ("{class} {0}",)}).texts_of("a/1.png") == ("a photo of a {class} {0}",)
