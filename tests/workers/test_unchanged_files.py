"""A folder that is ingested again: what stands unchanged is not opened, and what changed is told."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from in_process import without_ray
from PIL import Image

import workers.shard_stage
from flows.redo import forget_from
from sd3core.data.manifest import read_manifest
from sd3core.data.shards import read_shard_index
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError, UserError
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.ingest import ingest_stage
from workers.stage import NOTHING_TO_DO, StageResult

LONG_AGO_S = 1_700_000_000
_watched: list[tuple[str, set[str]]] = []  # folders, and the files that are opened in them


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str):
        for folder, opened in _watched:
            if arguments[0].startswith(folder):
                opened.add(os.path.relpath(arguments[0], folder))


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(_note_opened)  # for ever, so it looks at `_watched` alone


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def opened(folder):
    """The files of the folder that were opened, by whomever."""
    _watched.append((f"{folder}/", set()))
    yield _watched[-1][1]
    _watched.pop()


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    without_ray(monkeypatch, workers.shard_stage)
    return open_store(str(tmp_path / "store"))


@pytest.fixture(params=["file", "s3"])
def either_store(request, store) -> Store:
    return store if request.param == "file" else open_store(f"s3://{request.getfixturevalue('s3_bucket')}/a/prefix")


def write(path: Path, content: str | int, at: float = LONG_AGO_S) -> None:
    """A picture of a shade, or a file of words, last written to `at`."""
    if isinstance(content, int):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (content % 256, content // 256 % 256, 7)).save(path)
    else:
        path.write_text(content)
    os.utime(path, (at, at))


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    settings = ["data.source=folder", f"data.folder={folder}", "data.rows_per_shard=8", "caption.captioner=none"]
    return load_recipe("tiny-test", [*settings, *overrides])


def fill(folder: Path, images: int) -> None:
    for number in range(images):
        write(folder / f"{number:04d}.png", number)
        write(folder / f"{number:04d}.txt", f"number {number}")


def ingest(folder: Path, store: Store, *overrides: str, tell=lambda note: None) -> StageResult:
    return ingest_stage(recipe_of(folder, *overrides), store, ignore_progress, tell)


def captions(store: Store, result: StageResult) -> dict[str, str]:
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    rows = [
        row for entry in manifest.shards for row in read_shard_index(store, manifest.folder, entry.stem).to_pylist()
    ]
    return {row["source"]: row["caption"] for row in rows}


def test_a_second_run_opens_nothing_and_a_change_opens_what_changed(folder, either_store, opened):
    store = either_store
    fill(folder, 100)
    (folder / "0003.png").write_bytes(b"no image")
    os.utime(folder / "0003.png", (LONG_AGO_S, LONG_AGO_S))
    first = ingest(folder, store)
    assert first.rows == 99 and len(opened) == 200 and first.reason.startswith("first run; 99 of 100 images used, ")
    opened.clear()

    again = ingest(folder, store)
    assert again.skipped and not opened and again.manifest == first.manifest and again.warnings == first.warnings

    write(folder / "new.png", 200)
    write(folder / "new.txt", "a new one")
    write(folder / "0007.txt", "another caption", LONG_AGO_S + 1)
    (folder / "0011.png").unlink()
    (folder / "0011.txt").unlink()
    changed = ingest(folder, store)
    assert opened == {"new.png", "new.txt", "0007.txt"}
    shards = len(read_manifest(store, changed.manifest.folder).shards)
    told = "1 caption changed, 1 image added, 1 removed: "
    assert changed.reason.startswith(told) and f" of {shards} shards; 99 of 100 images used, " in changed.reason
    assert changed.made <= 4 and changed.made + changed.done_before == shards
    assert captions(store, changed)["0007.png"] == "another caption" and "0011.png" not in captions(store, changed)
    opened.clear()

    os.utime(folder / "0020.png", (LONG_AGO_S + 5, LONG_AGO_S + 5))
    touched = ingest(folder, store)
    assert opened == {"0020.png"} and touched.skipped and touched.manifest == changed.manifest
    opened.clear()
    assert ingest(folder, store).skipped and not opened

    write(folder / "0021.png", 999, LONG_AGO_S + 5)
    assert ingest(folder, store).reason.startswith("1 image changed: 1 of ") and opened == {"0021.png"}
    (folder / "0022.png").unlink()
    assert ingest(folder, store).reason.startswith("1 image removed: ") and opened == {"0021.png"}


def test_what_comes_out_is_what_a_first_run_makes(folder, store, tmp_path):
    """After changes of every kind, and with images that are no use, notes of pictures, and several lines."""
    fill(folder, 40)
    write(folder / "0001.txt", "two\nlines")
    Image.new("RGBA", (40, 40), (1, 2, 3, 100)).save(folder / "0002.png")
    Image.new("RGB", (9, 9)).save(folder / "0004.png")
    Image.new("RGB", (40, 40)).save(folder / "0005.tif")
    (folder / "0006.txt").write_bytes(b"caf\xe9")
    results = [ingest(folder, store)]
    for change in range(4):
        write(folder / f"more{change}.png", 100 + change)
        write(folder / f"more{change}.txt", "several\nlines here")
        (folder / f"{10 + change:04d}.png").rename(folder / f"moved{change}.png")
        write(folder / f"{20 + change:04d}.txt", f"otherwise {change}")
        results.append(ingest(folder, store))
    other = open_store(str(tmp_path / "other"))
    anew = ingest(folder, other)
    assert anew.manifest == results[-1].manifest and sorted(anew.warnings) == sorted(results[-1].warnings)
    assert read_manifest(store, anew.manifest.folder) == read_manifest(other, anew.manifest.folder)
    assert len(anew.warnings) >= 4 and not results[-1].skipped


def test_a_file_that_was_written_to_a_moment_ago_is_looked_at_again(folder, store, opened):
    """The same size, and the same time where its clock is coarse: only its bytes say that it is another one."""
    now = time.time()
    fill(folder, 10)
    write(folder / "0001.txt", "caption A", now)
    write(folder / "0002.png", 50, now)
    ingest(folder, store)
    opened.clear()
    assert ingest(folder, store).skipped and opened == {"0001.txt", "0002.png"}
    opened.clear()
    write(folder / "0001.txt", "caption B", now)
    changed = ingest(folder, store)
    assert opened == {"0001.txt", "0002.png"} and captions(store, changed)["0001.png"] == "caption B"
    for name in ("0001.txt", "0002.png"):
        os.utime(folder / name, (LONG_AGO_S, LONG_AGO_S))
    ingest(folder, store)
    opened.clear()
    assert ingest(folder, store).skipped and not opened


def test_metadata_is_read_where_a_name_or_time_changed(folder, store, opened):
    for number in range(20):
        write(folder / f"{number:04d}.png", number)
    rows = [f'{{"file_name": "{number:04d}.png", "text": "row {number}"}}' for number in range(21)]
    write(folder / "metadata.jsonl", "\n".join(rows))
    told: list[str] = []
    first = ingest(folder, store, tell=told.append)
    assert told == ["1 metadata row not used: its file_name is no image of the folder; write the image's path from the"
                    " metadata's folder on: metadata.jsonl line 21 (0020.png (nearest: 0012.png))"]  # fmt: skip
    assert told[0] in first.warnings
    opened.clear()
    assert ingest(folder, store).warnings == first.warnings and not opened
    write(folder / "metadata.jsonl", "\n".join(rows[:-1]).replace("row 5", "row V"), LONG_AGO_S + 1)
    changed = ingest(folder, store)
    assert changed.reason.startswith("1 caption changed: 1 of ") and opened == {"metadata.jsonl"}
    assert captions(store, changed)["0005.png"] == "row V" and not changed.warnings


@pytest.mark.parametrize("lost", ["folder", "slices", "all"])
@pytest.mark.parametrize("harm", ["gone", "damaged", "another's"])
def test_a_record_that_is_lost_costs_looking_and_makes_nothing(folder, store, opened, lost, harm):
    """Where it is of the folder alone, as when a run was killed before its end, the shards' records say all."""
    fill(folder, 30)
    first = ingest(folder, store)
    seen = [entry.path for entry in store.list(first.manifest.folder) if entry.path.endswith(".seen.json.gz")]
    of_folder = [path for path in seen if "/FOLDER." in path]
    chosen = {"folder": of_folder, "slices": [path for path in seen if path not in of_folder], "all": seen}[lost]
    others = [store.get(path) for path in seen[:2]][::-1]
    for path in chosen:
        if harm == "gone":
            store.delete(path)
        else:
            store.put(path, b"no record" if harm == "damaged" else others[path != seen[0]])
    opened.clear()
    again = ingest(folder, store)
    assert again.skipped and again.reason == NOTHING_TO_DO and again.manifest == first.manifest
    if lost == "folder":
        assert len(opened) <= 2  # one that can be used is looked for where nothing is known of the folder
    elif lost == "all":
        assert len(opened) == 60
    else:
        assert not opened


def test_another_folder_of_the_same_content_makes_nothing(folder, store, opened, tmp_path):
    """Times say nothing across folders: a copy with the same sizes and times may hold other bytes."""
    fill(folder, 20)
    first = ingest(folder, store)
    folder.rename(tmp_path / "elsewhere")
    folder.mkdir()
    fill(folder, 20)
    write(folder / "0001.txt", "numbeR 1")
    moved = ingest(tmp_path / "elsewhere", store)
    assert moved.skipped and moved.manifest == first.manifest
    fresh = ingest(folder, open_store(str(tmp_path / "other")))
    assert fresh.manifest != first.manifest


def test_from_stage_opens_all_again(folder, store, opened):
    """Also a file of other bytes whose size and time say nothing."""
    fill(folder, 20)
    ingest(folder, store)
    write(folder / "0001.txt", "numbeR 1")
    assert ingest(folder, store).skipped
    opened.clear()
    forget_from(recipe_of(folder), store, "ingest")
    again = ingest(folder, store)
    assert len(opened) == 40 and captions(store, again)["0001.png"] == "numbeR 1"


def test_a_folder_whose_last_usable_image_goes_is_an_error_each_time(folder, store):
    fill(folder, 2)
    ingest(folder, store)
    for number in range(2):
        write(folder / f"{number:04d}.png", "no image", LONG_AGO_S + 1)
    for _ in range(2):
        with pytest.raises(DataError, match=r"no usable image \(2 rejected: not an image that can be read"):
            ingest(folder, store)
    write(folder / "0001.png", 1)
    assert ingest(folder, store).rows == 1


def test_among_many_that_are_no_use_the_workers_look_for_one_that_is(folder, store, monkeypatch):
    """The driver opens few; where the workers find none either, the error counts all."""
    monkeypatch.setattr("sd3core.data.ingest_folder.LOOKED_AT", 3)
    for number in range(20):
        write(folder / f"{number:04d}.png", "no image")
        write(folder / f"{number:04d}.txt", "words")
    with pytest.raises(DataError, match=r"no usable image \(20 rejected: not an image that can be read"):
        ingest(folder, store)
    write(folder / "0013.png", 13)
    assert ingest(folder, store).rows == 1


def test_a_right_that_comes_back_is_noticed(folder, store, monkeypatch):
    """It changes no size and no time of the file."""
    fill(folder, 3)
    really = type(folder).open

    def refused(path, *arguments, **options):
        if path.name == "0001.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return really(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(folder), "open", refused)  # file modes do not stop root
        assert ingest(folder, store).rows == 2
    assert ingest(folder, store).rows == 3


@pytest.mark.parametrize("source", ["folder", "table"])
def test_what_was_not_there_to_be_read_is_taken_once_it_is(source, folder, store, tmp_path):
    """A link out of the folder that gives way to the file itself; a table's file that comes. Their words are as they were."""
    fill(folder, 2)
    write(tmp_path / "elsewhere.png", 7)
    settings = ["caption.captioner=vision_language_model", "caption.model=/a/model"]
    if source == "folder":
        (folder / "late.png").symlink_to(tmp_path / "elsewhere.png")
    else:
        rows = [{"path": f"{name}.png", "text": name} for name in ("0000", "0001", "late")]
        write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows)))
        settings += ["data.source=table", f"data.table={tmp_path / 't.jsonl'}"]
    assert ingest(folder, store, *settings).rows == 2
    (folder / "late.png").unlink(missing_ok=True)
    write(folder / "late.png", 9)
    assert ingest(folder, store, *settings).rows == 3


def test_a_shard_whose_done_record_is_lost_is_made_again_though_its_files_stand(folder, store):
    fill(folder, 30)
    first = ingest(folder, store)
    entry = read_manifest(store, first.manifest.folder).shards[1]
    store.delete(f"{first.manifest.folder}/{entry.stem}.done.json")
    again = ingest(folder, store)
    assert (again.made, again.manifest) == (1, first.manifest)


def test_bytes_that_changed_under_the_same_size_and_time_are_named_where_they_are_needed(folder, store):
    """The shard that had the old ones is gone, so the file is opened; its digest is that of the bytes before."""
    fill(folder, 6)
    write(folder / "plain.txt", "not compressed")
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "plain.bmp")
    os.utime(folder / "plain.bmp", (LONG_AGO_S, LONG_AGO_S))
    first = ingest(folder, store)
    Image.new("RGB", (40, 40), (7, 7, 7)).save(folder / "plain.bmp")
    os.utime(folder / "plain.bmp", (LONG_AGO_S, LONG_AGO_S))
    assert ingest(folder, store).skipped
    for entry in read_manifest(store, first.manifest.folder).shards:
        store.delete(f"{first.manifest.folder}/{entry.stem}.tar")
    for number in range(6):
        write(folder / f"{number:04d}.txt", "another caption")
    with pytest.raises(UserError, match=r"plain\.bmp changed since .*touch it and run ingest again"):
        ingest(folder, store)
    os.utime(folder / "plain.bmp", (LONG_AGO_S + 1, LONG_AGO_S + 1))
    mended = ingest(folder, store)
    assert mended.rows == 7 and "6 captions changed, 1 image changed: " in mended.reason
    assert all("damaged or gone" in line for line in mended.warnings[:1])


class Killed(BaseException):
    """As a kill, it is caught by nobody."""


def test_a_run_that_is_killed_at_any_write_goes_on(folder, store, opened, tmp_path, monkeypatch):
    """Before every single object that it writes: the same command makes the rest, and what a first run would have made."""
    fill(folder, 12)
    ingest(folder, store)
    write(folder / "new.png", 200)
    write(folder / "0007.txt", "another caption", LONG_AGO_S + 1)
    (folder / "0003.png").unlink()
    expected = ingest(folder, open_store(str(tmp_path / "other"))).manifest
    shutil.copytree(store.local_path("datasets").parent, tmp_path / "undisturbed")
    made = ingest(folder, open_store(str(tmp_path / "undisturbed"))).made
    assert made >= 2
    writes: list[str] = []

    def killed_at_last(really):
        def put(self, path, what):
            if len(writes) == kill_at:
                raise Killed
            writes.append(path)
            really(self, path, what)

        return put

    kill_at, killed = 0, True
    while killed:
        copy = tmp_path / f"store-{kill_at}"
        shutil.copytree(store.local_path("datasets").parent, copy)
        writes.clear()
        with monkeypatch.context() as patch:
            for name in ("put", "put_file"):
                patch.setattr(type(store), name, killed_at_last(getattr(type(store), name)))
            try:
                ingest(folder, open_store(str(copy)))
                killed = False
            except Killed:
                pass
        done = {path.rpartition("/")[2] for path in writes if path.endswith(".seen.json.gz") and "FOLDER" not in path}
        opened.clear()
        again = ingest(folder, open_store(str(copy)))
        assert again.manifest == expected and opened <= {"new.png", "0007.txt"}
        assert not opened or len(done) < made
        opened.clear()
        assert ingest(folder, open_store(str(copy))).skipped and not opened
        kill_at += 1
    assert kill_at > 10 and len({path for path in writes if path.endswith(".seen.json.gz")}) >= 2
