"""Tars against Python's own reader: every format it writes, and archives that are cut, damaged or made to do harm."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from source_files import samples, tar_of

from sd3core.data.sources.ranged_file import RangedFile
from sd3core.data.sources.tars import LONGEST_HEADER, TarReader
from sd3core.data.store import open_store


@pytest.fixture
def read(tmp_path):
    """The samples of an archive, and its reader."""
    store = open_store(str(tmp_path))

    def of(data: bytes):
        store.put("a.tar", data)
        entry = store.entry("a.tar")
        with RangedFile(store, "a.tar", entry.size, entry.tag) as file:
            reader = TarReader(file)
            found = {}
            for sample in reader.samples():
                for extension, member in sample.members.items():
                    file.seek(member.offset)
                    found[f"{sample.key}.{extension}"] = file.read(member.size)
            return found, reader

    return of


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes_is_read_as_python_reads_it(format_, read):
    rng = np.random.default_rng(0)
    names = ["a/b/plain.jpg", "a/b/plain.txt", "sub/" + "x" * 90 + ".jpg", "ключ.jpg", "e.jpg"]
    if format_ != tarfile.USTAR_FORMAT:
        names += ["y" * 300 + ".jpg", "z/" * 60 + "deep.txt"]
    members = [(name, rng.bytes(int(rng.integers(0, 3000)))) for name in names]
    found, reader = read(tar_of(members, format_))
    assert found == dict(members) and reader.is_marked and reader.damage is None


def test_tars_put_behind_each_other_are_told_and_the_first_is_read_whole(read):
    members, others = samples(0, 2), samples(2, 2)
    whole = tar_of(members)
    found, reader = read(whole + tar_of(others))
    assert found == dict(members) and reader.is_marked
    end = reader.damage.place
    assert (
        str(reader.damage) == "ended by a mark with more behind it" and not any(whole[end:]) and any(whole[:end][-512:])
    )
    assert read(whole + bytes(3 << 20))[1].damage is None  # zeros that fill it up


def test_a_cut_at_any_byte_costs_what_is_behind_it(read):
    """No error, no sample that is not whole taken for one, and none lost that was whole and not the last."""
    members = samples(0, 3)
    whole = tar_of(members)
    complete, _ = read(whole)
    used = len(whole) - whole[::-1].index(next(b for b in whole[::-1] if b)) + 1024
    for cut in range(0, used, 211):
        store_names, reader = read(whole[:cut])
        kept = {name: data for name, data in store_names.items() if complete.get(name) == data}
        broken = [name for name in store_names if name not in kept]
        assert len(broken) <= 1 and not (broken and reader.damage is None)
        assert (reader.damage is not None) or cut % 512 == 0 or reader.is_marked


def test_a_damaged_header_ends_it_with_its_place(read):
    data = bytearray(tar_of(samples(0, 4)))
    place = data.index(b"000000002.png")
    data[place + 5] ^= 0xFF
    found, reader = read(bytes(data))
    assert {name[:9] for name in found} == {"000000000", "000000001"}
    assert str(reader.damage) == "damaged" and reader.damage.place == place


def header(name: str, size: int, kind: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        header("x", 1 << 40, tarfile.XHDTYPE),  # a header that would fill the memory
        header("x", LONGEST_HEADER + 1, tarfile.GNUTYPE_LONGNAME) + b"x" * 5000,
        header("x", 30, tarfile.XHDTYPE) + b"99999999999999999999 path=x\n".ljust(512, b"\0"),
        header("x", 12, tarfile.XHDTYPE) + b"0 path=abcd\n".ljust(512, b"\0"),
        header("x", 13, tarfile.XHDTYPE) + b"13 size=-999\n".ljust(512, b"\0") + header("a.jpg", 5, tarfile.REGTYPE),
        header("a.jpg", 1 << 62, tarfile.REGTYPE),
    ],
    ids=["huge pax", "huge name", "length", "no length", "negative size", "huge file"],
)
def test_harmful_headers_end_it_and_cost_no_memory(data, read):
    _, reader = read(data)
    assert reader.damage is not None


def test_a_size_that_is_too_large_for_the_plain_header_is_taken_from_the_one_before(read):
    content = b"12345"
    extended = b"10 size=5\n"
    data = header("x", len(extended), tarfile.XHDTYPE) + extended.ljust(512, b"\0")
    data += header("a.jpg", 0, tarfile.REGTYPE) + content.ljust(512, b"\0") + header("b.jpg", 0, tarfile.REGTYPE)
    found, reader = read(data + bytes(1024))
    assert found == {"a.jpg": content, "b.jpg": b""} and reader.is_marked


def test_neighbours_of_one_key_are_a_sample_and_no_others(read, tmp_path):
    names = ["./a.jpg", "./a.txt", "b.jpg", "a.json", "c/a.jpg", "c/a.seg.png", "c/a.jpg", "c/.a.jpg", "__MACOSX/a.jpg"]
    store = open_store(str(tmp_path))
    store.put("b.tar", tar_of([(name, name.encode()) for name in names]))
    entry = store.entry("b.tar")
    with RangedFile(store, "b.tar", entry.size, entry.tag) as file:
        found = [(sample.key, list(sample.members)) for sample in TarReader(file).samples()]
    assert found == [
        ("a", ["jpg", "txt"]),
        ("b", ["jpg"]),
        ("a", ["json"]),
        ("c/a", ["jpg", "seg.png"]),
        ("c/a", ["jpg"]),
    ]


def test_sparse_files_links_and_devices_are_no_members(read):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("a.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert read(sink.getvalue())[0] == {}
