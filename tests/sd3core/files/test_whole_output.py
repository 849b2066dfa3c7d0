"""A file that takes another's place: readers see one of the two, whatever becomes of the writer."""

import os

import pytest

from sd3core.files.whole_output import PARTIAL, atomic_replacement


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    return path


def test_the_old_file_stands_until_the_new_one_is_whole(target):
    with atomic_replacement(target) as file:
        file.write(b"after")
        file.flush()
        assert target.read_bytes() == b"before"
        [partial] = {*target.parent.iterdir()} - {target}
        assert partial.name.startswith(PARTIAL) and partial.read_bytes() == b"after"
    assert target.read_bytes() == b"after" and [*target.parent.iterdir()] == [target]


@pytest.mark.parametrize("fault", [KeyError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(target, fault):
    with pytest.raises(fault), atomic_replacement(target) as file:
        file.write(b"half")
        raise fault
    assert target.read_bytes() == b"before" and [*target.parent.iterdir()] == [target]


def test_a_file_cannot_be_written_into_a_file(target):
    with pytest.raises(NotADirectoryError), atomic_replacement(target / "below"):
        pass


@pytest.mark.parametrize("mode, expected", [(0o666, 0o640), (0o600, 0o600)])
def test_the_mode_is_that_of_a_new_file(target, mode, expected):
    before = os.umask(0o027)
    try:
        with atomic_replacement(target, mode=mode) as file:
            file.write(b"after")
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == expected


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_durable_is_on_disk_before_it_takes_the_place(target, monkeypatch, durable):
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append("on disk"))
    monkeypatch.setattr(os, "replace", lambda source, place: (seen.append("replaced"), real(source, place)))
    with atomic_replacement(target, durable=durable) as file:
        file.write(b"after")
    assert seen == (["on disk", "replaced"] if durable else ["replaced"])
