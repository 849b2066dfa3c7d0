"""What this machine has compared with a digest: files, and objects of a store elsewhere."""

from __future__ import annotations

import pytest

from sd3core.data import checked_files
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.records import record_bytes
from sd3core.data.store import StoreNotFound

DATA = bytes(range(100))
RECORD = record_bytes(DATA)
OTHER = DATA[:-1] + b"\0"  # of the same size


@pytest.fixture
def checked(tmp_path):
    return CheckedFiles(tmp_path / "checked")


@pytest.fixture
def reads(store, monkeypatch) -> list[int]:
    """A number for each span that is read of an object, and for each file."""
    seen: list[int] = []
    get_range, sha256_of = type(store).get_range, checked_files.sha256_of
    monkeypatch.setattr(checked_files, "SPAN_BYTES", 40)
    monkeypatch.setattr(checked_files, "sha256_of", lambda path: seen.append(1) or sha256_of(path))
    monkeypatch.setattr(
        type(store),
        "get_range",
        lambda self, path, start, length: seen.append(length) or get_range(self, path, start, length),
    )
    return seen


def test_an_object_is_read_once_and_again_when_it_was_written_anew(store, checked, reads):
    once = [40, 40, 20] if store.local_path("x") is None else [1]
    store.put("x", DATA)
    assert [checked.holds(store, "x", RECORD) for _ in range(3)] == [True] * 3 and reads == once
    assert CheckedFiles(checked.folder).holds(store, "x", RECORD) and reads == once  # another process
    store.put("x", OTHER)
    assert not checked.holds(store, "x", RECORD) and not checked.holds(store, "x", RECORD)
    assert reads == 3 * once  # what is damaged is no news to keep
    store.put("x", DATA)
    assert checked.holds(store, "x", RECORD)


def test_another_size_or_nothing_is_told_unread(store, checked, reads):
    store.put("x", DATA[:50])
    store.put("empty", b"")
    assert not checked.holds(store, "x", RECORD) and not checked.holds(store, "y", RECORD) and reads == []
    assert checked.holds(store, "empty", record_bytes(b""))


def test_what_is_fetched_need_not_be_read_again(store, checked, reads, tmp_path):
    """Neither where it lies nor where it came from."""
    target = tmp_path / "cache" / "x"
    store.put("x", DATA)
    assert checked.fetch(store, "x", target, RECORD) and reads == [1]
    assert checked.is_whole(target, RECORD) and reads == [1]
    if store.local_path("x") is None:
        assert checked.holds(store, "x", RECORD) and reads == [1]
    with pytest.raises(StoreNotFound):
        checked.fetch(store, "y", target, RECORD)


def test_an_object_that_comes_damaged_is_known_as_whole_no_more(store, checked, monkeypatch, tmp_path):
    """As of a disk that has lost a bit: the object has its ETag still."""
    if store.local_path("x") is not None:
        pytest.skip("files are fetched by links")
    store.put("x", DATA)
    assert checked.holds(store, "x", RECORD)
    monkeypatch.setattr(type(store), "get_file", lambda self, path, local: local.write_bytes(OTHER))
    monkeypatch.setattr(type(store), "get_range", lambda self, path, start, length: OTHER[start : start + length])
    assert checked.holds(store, "x", RECORD)
    assert not checked.fetch(store, "x", tmp_path / "x", RECORD)
    assert not checked.holds(store, "x", RECORD)


def test_an_object_that_is_written_while_it_is_read_is_read_again(store, checked, monkeypatch):
    store.put("x", DATA)
    real = checked_files._sha256_of_object, checked_files.sha256_of

    def written_meanwhile(number):
        def digest(*arguments):
            found = real[number](*arguments)
            store.put("x", OTHER)
            return found

        return digest

    monkeypatch.setattr(checked_files, "_sha256_of_object", written_meanwhile(0))
    monkeypatch.setattr(checked_files, "sha256_of", written_meanwhile(1))
    assert checked.holds(store, "x", RECORD) and not checked.holds(store, "x", RECORD)
