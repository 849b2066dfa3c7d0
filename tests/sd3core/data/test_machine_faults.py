"""What runs out on the machine is never written down as a fault of an image: the shard is not committed, and is made again."""

from __future__ import annotations

import errno
import io

import numpy as np
import pytest
from folder_ingest import read_items, slices_of
from PIL import Image, ImageFile

from sd3core.data import images
from sd3core.data.images import PixelRules, read_picture
from sd3core.data.ingest_folder import FolderWorker
from sd3core.errors import DataError, UserError, is_of_the_machine
from sd3core.recipe import Data

RULES = PixelRules(10**6)
OUT = {
    "memory": MemoryError(),
    "memory, by the system": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "memory, by a codec of Pillow": OSError("out of memory when reading image file"),
    "memory, by libavif": RuntimeError("Failed to decode image: Out of memory"),
    "memory, by torch": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "threads": RuntimeError("can't start new thread"),
    "files": OSError(errno.EMFILE, "Too many open files"),
    "space": OSError(errno.ENOSPC, "No space left on device"),
}
OF_THE_FILE = [
    OSError("image file is truncated"),
    SyntaxError("broken PNG file"),
    ValueError("x"),
    OverflowError(),
    IndexError(),
]


def jpeg() -> bytes:
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(sink, "JPEG", exif=exif.tobytes())
    return sink.getvalue()


def raising(error):
    def raise_it(*args, **kwargs):
        raise error

    return raise_it


STEPS = {
    "the header": (images.Image, "open"),
    "the pixels": (ImageFile.ImageFile, "load"),
    "the channels": (images, "split_channels"),
    "the colours": (images, "_in_srgb"),
    "the orientation": (Image.Image, "getexif"),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", OUT)
def test_it_is_raised_in_every_step_of_reading_an_image(name, step, monkeypatch):
    assert is_of_the_machine(OUT[name])
    place, attribute = STEPS[step]
    data = jpeg()
    monkeypatch.setattr(place, attribute, raising(OUT[name]))
    with pytest.raises(type(OUT[name])) as raised:
        read_picture(data, RULES)
    assert raised.value is OUT[name]


@pytest.mark.parametrize("error", OF_THE_FILE, ids=lambda error: type(error).__name__)
def test_what_is_the_file_s_fault_stays_a_reject(error, monkeypatch):
    assert not is_of_the_machine(error)
    data = jpeg()
    monkeypatch.setattr(ImageFile.ImageFile, "load", raising(error))
    with pytest.raises(DataError, match="^truncated or damaged image$"):
        read_picture(data, RULES)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "pictures"
    place.mkdir()
    for name in ("a", "b", "c"):
        (place / f"{name}.jpg").write_bytes(jpeg() + name.encode())
        (place / f"{name}.txt").write_text(name)
    return Data(name="pictures", source="folder", folder=str(place))


def test_ingest_commits_nothing_and_makes_the_whole_shard_again(folder, file_store, monkeypatch):
    worker = FolderWorker(folder, file_store.url, "raw", captions_needed=False)
    (shard,) = slices_of(folder)
    calls = []

    def second_fails(data, rules):
        calls.append(data)
        if len(calls) == 2:
            raise MemoryError
        return read_picture(data, rules)

    monkeypatch.setattr("sd3core.data.ingest_folder.read_picture", second_fails)
    with pytest.raises(MemoryError, match=r"^while reading b\.jpg: out of memory; fewer compute\.actors"):
        worker(shard)
    assert not list(file_store.list("raw"))
    record = worker(shard).record
    assert (record.rows, record.failed) == (3, [])


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENOMEM])
def test_a_file_that_the_machine_cannot_read_now_is_neither_changed_nor_rejected(
    folder, file_store, monkeypatch, number
):
    (shard,) = slices_of(folder)
    monkeypatch.setattr("pathlib.Path.read_bytes", raising(OSError(number, "not now")))
    with pytest.raises(UserError, match=r"/a\.jpg: not now"):
        FolderWorker(folder, file_store.url, "raw", captions_needed=False)(shard)
    assert not list(file_store.list("raw"))


def test_reading_a_folder_does_not_reject_what_the_machine_cannot_read_now(folder, monkeypatch):
    monkeypatch.setattr("hashlib.file_digest", raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(UserError, match=r"data\.folder: .*/a\.jpg: Too many open files"):
        read_items(folder, captions_needed=True)
