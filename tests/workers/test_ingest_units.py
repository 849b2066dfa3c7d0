"""Tars and parquet files through the real ingest stage: what is taken, what is left out and why, and what is read again."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from counting_models import TOWERS, count_models
from data_chain import encode_all
from in_process import without_ray
from source_files import (
    LONG_AGO_S,
    SourceFolder,
    img2dataset,
    parquet_of,
    picture,
    sample,
    samples,
    tar_of,
)

import workers.shard_stage
from flows.redo import forget_from
from sd3core.data.manifest import Manifest, read_manifest
from sd3core.data.shards import read_raw_samples, read_shard_done, read_shard_index
from sd3core.data.sources import ingest_unit
from sd3core.data.sources.ranged_file import RangedFile
from sd3core.data.store import FileStore, S3Store, Store, StoreDenied, StoreNotFound, open_store
from sd3core.errors import DataError, StoreError, UserError
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from workers.caption import caption_stage
from workers.ingest import ingest_stage
from workers.stage import StageFailed, StageResult


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    without_ray(monkeypatch, workers.shard_stage)
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def source(tmp_path, store) -> SourceFolder:
    return SourceFolder(str(tmp_path / "source"))


@pytest.fixture(params=["file", "s3"])
def either_source(request, source) -> SourceFolder:
    return source if request.param == "file" else SourceFolder(f"s3://{request.getfixturevalue('s3_bucket')}/a/prefix")


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The source files that were opened, by whomever."""
    paths: list[str] = []
    really = RangedFile.__init__

    def noted(self, store, path, *rest):
        paths.append(path)
        really(self, store, path, *rest)

    monkeypatch.setattr(RangedFile, "__init__", noted)
    return paths


def recipe_of(urls: str | list[str], *overrides: str, source: str = "webdataset") -> Recipe:
    named = [urls] if isinstance(urls, str) else urls
    settings = [f"data.source={source}", f"data.urls={named}", "data.rows_per_shard=8", "caption.captioner=none"]
    return load_recipe("tiny-test", [*settings, *overrides])


def ingest(urls, store: Store, *overrides: str, tell=lambda note: None, **kind: str) -> StageResult:
    return ingest_stage(recipe_of(urls, *overrides, **kind), store, ignore_progress, tell)


def manifest_of(store: Store, result: StageResult) -> Manifest:
    return read_manifest(store, result.manifest.folder, result.manifest.digest)


def rows_of(store: Store, result: StageResult) -> dict[str, dict]:
    """Index rows by where they come from."""
    manifest = manifest_of(store, result)
    rows = [row for e in manifest.shards for row in read_shard_index(store, manifest.folder, e.stem).to_pylist()]
    return {row["source"]: row for row in rows}


def stems(store: Store, result: StageResult) -> set[str]:
    return {entry.stem for entry in manifest_of(store, result).shards}


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 400 million pixels."""
    size = struct.pack(">II5B", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def with_links() -> bytes:
    """A tar whose members' names are paths out of it, links, folders, and what a Mac adds."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, target
            tar.addfile(member, io.BytesIO(content))

        add("a/", kind=tarfile.DIRTYPE)
        for key in ("../../out", "/etc/passwd", "a/" + "long" * 60, "ключ", "name with words"):
            stem = key.partition(".jpg")[0]
            add(f"{stem}.png", picture(len(key)))
            add(f"{stem}.txt", b"words")
        add("link.png", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add("__MACOSX/._a.png", b"resource fork")
        add("._b.png", b"resource fork")
        add("a/.hidden.png", b"hidden")
    return sink.getvalue()


def test_planted_faults_are_counted_by_reason_and_totals_add_up_to_the_input(either_source, store):
    """file:// and s3://: every row of the input is taken or counted with its reason, and no other row is."""
    source = either_source
    source.put_dataset("00000", img2dataset(0, ["success"] * 10 + ["failed_to_download"] * 2 + ["failed_to_resize"]))
    whole = img2dataset(100, ["success"] * 12 + ["failed_to_download"])
    tar = whole[".tar"]
    source.put_dataset("00001", whole | {".tar": tar[: len(tar) // 2]})
    plain = tar_of(samples(200, 10))
    source.put("plain/cut.tar", plain[: len(plain) // 2])
    odd = [
        ("text.jpg", b"<html>"), ("text.txt", b"no image"),
        *sample("small", 1, "words")[1:], ("small.png", picture(1, size=(9, 9))),
        ("bomb.png", bomb()), ("bomb.txt", b"a bomb"),
        *sample("silent", 2),
        ("words.txt", b"alone"),
        *sample("again", 3, "first"), *sample("other", 4, "x"), *sample("again", 5, "second"),
        *sample("latin", 6), ("latin.txt", b"caf\xe9"),
        ("denied.png", picture(7)), ("denied.json", b'{"status": "failed_to_resize", "caption": "c"}'),
        ("broken.png", picture(8)), ("broken.txt", b"fine"), ("broken.json", b'{"a":'),
    ]  # fmt: skip
    source.put("plain/odd.tar", tar_of(odd))
    source.put("plain/links.tar", with_links())
    source.put("plain/packed.tar", b"\x1f\x8b" + b"0" * 600)
    source.put("plain/noise.tar", b"x" * 2000)
    source.put("plain/nothing.tar", b"")
    source.put("plain/empty.tar", tar_of([]))
    source.put("plain/part_incomplete.tar", tar_of(samples(300, 2)))
    source.put("plain/packed.tar.gz", b"\x1f\x8b")
    source.put("_tmp/00000.tar", tar_of(samples(300, 2)))
    source.put("00002.tar", tar_of(samples(300, 2)))
    told: list[str] = []
    result = ingest(source.url, store, tell=told.append)
    manifest = manifest_of(store, result)
    in_cut = sum(name.startswith("00001.tar/") for name in rows_of(store, result))
    in_plain_cut = sum(name.startswith("plain/cut.tar/") for name in rows_of(store, result))
    assert 3 <= in_cut <= 8 and 3 <= in_plain_cut <= 8
    reasons = manifest.failed_reasons
    words = next(reason for reason in reasons if reason.startswith("words without"))
    silent = next(reason for reason in reasons if reason.startswith("no caption in txt, caption, text, json.caption"))
    assert reasons == {
        "status failed_to_download": 3,
        "status failed_to_resize": 2,
        "img2dataset's table has it, and the tar does not": 12 - in_cut - 1,
        "its file ends or is damaged in it": 2,
        "not an image that can be read (save it as JPEG or PNG)": 1,
        "a side is shorter than 32 px (data.min_side_px)": 1,
        "more than 100,000,000 pixels (data.max_image_pixels)": 1,
        silent: 1,
        words: 1,
        "its caption is not UTF-8; save it as UTF-8": 1,
        "a tar that is compressed (gzip), which is not read: unpack it": 1,
        "a tar that is no tar": 1,
        "an empty tar": 2,
    }
    assert manifest.rows == 10 + in_cut + in_plain_cut + 4 + 5
    total = 13 + 13 + (in_plain_cut + 1) + 11 + 5 + 4
    assert f"; {manifest.rows} of {total} images used, " in result.reason
    assert {note.partition(": ")[0] for note in told} == {
        "1 file of data.urls passed over, not whole yet, its writer has not put its _stats.json beside it",
        "1 file of data.urls passed over, not whole yet, as its name says",
        "1 file of data.urls passed over, compressed, which is not read",
        "1 file of data.urls passed over, in a name that begins with . or _",
    }
    warnings = "\n".join(result.warnings)
    assert "3 tars damaged, and read as far as that goes: 00001.tar (cut short, byte " in warnings
    assert "1 sample whose json cannot be read: plain/odd.tar/broken" in warnings


def test_a_status_that_is_not_img2datasets_leaves_nothing_out(source, store):
    rows = [{"image": picture(n), "caption": f"number {n}", "status": "published"} for n in range(3)]
    source.put("a.parquet", parquet_of(rows))
    assert ingest(source.url, store, source="parquet").rows == 3
    source.put("a.tar", tar_of(sample("1", 9, "words", json=b'{"status": "ok"}')))
    assert ingest(source.url, store).rows == 1


def test_names_of_members_are_words_and_keys_are_unique(source, store):
    """Nothing is opened by a member's name; two rows of one key, in one tar or in two, are two rows."""
    source.put("a.tar", with_links())
    source.put("b.tar", tar_of([*sample("k", 1, "one"), *sample("m", 2, "two"), *sample("k", 3, "three")]))
    source.put("c.tar", tar_of([*sample("k", 1, "one")]))
    result = ingest(source.url, store)
    rows = rows_of(store, result)
    keys = [row["key"] for row in rows.values()]
    manifest = manifest_of(store, result)
    assert manifest.rows == 9 == len({*keys}) + 1  # two of b.tar are called alike, and are two
    assert all(not set("./\\") & set(key) for key in keys)
    assert {"a.tar/../../out", "a.tar//etc/passwd", "a.tar/ключ", "a.tar/name with words"} < rows.keys()


def test_a_second_run_opens_nothing_and_a_new_tar_makes_its_own_shards_alone(either_source, store, opened):
    source = either_source
    for number in (0, 1, 3):
        source.put(f"{number:05d}.tar", tar_of(samples(100 * number, 20)))
    first = ingest(source.url, store)
    assert first.rows == 60 and first.made == 9 and len(opened) == 4  # one to see that there is an image at all
    opened.clear()
    again = ingest(source.url, store)
    assert again.skipped and not opened and again.manifest == first.manifest and again.warnings == first.warnings

    source.put("00002.tar", tar_of(samples(200, 5)))
    added = ingest(source.url, store)
    assert opened == ["00002.tar"] and stems(store, added) > stems(store, first) and added.made == 1
    assert added.reason.startswith("1 tar added: 1 of 10 shards; 65 of 65 images used, ")
    opened.clear()

    # one more row in the middle of a tar of three shards: the ones before it stand
    source.put("00001.tar", tar_of([*samples(100, 12), *sample("new", 7, "new"), *samples(112, 8)]), LONG_AGO_S + 5)
    changed = ingest(source.url, store)
    assert opened == ["00001.tar"] and changed.reason.startswith("1 tar changed: 2 of 10 shards; 66 of 66 ")
    assert len(stems(store, added) - stems(store, changed)) == 2
    opened.clear()

    source.delete("00000.tar")
    removed = ingest(source.url, store)
    assert not opened and removed.reason.startswith("1 tar removed: 0 of 7 shards; ") and removed.rows == 46
    assert stems(store, removed) < stems(store, changed)

    forget_from(recipe_of(source.url), store, "ingest")
    assert ingest(source.url, store).manifest == removed.manifest and sorted({*opened}) == [
        "00001.tar",
        "00002.tar",
        "00003.tar",
    ]


def test_the_source_is_only_read(source, store, s3_bucket, monkeypatch):
    """No object of it is another one afterwards, and no request to its bucket is a write."""
    place = SourceFolder(f"s3://{s3_bucket}/tars")
    place.put_dataset("00000", img2dataset(0, ["success"] * 10 + ["failed_to_download"]))
    before = [(entry.path, entry.tag, entry.modified) for entry in place.store.list()]
    for name in ("put", "put_file", "delete", "remove_abandoned"):
        monkeypatch.setattr(S3Store, name, lambda *_: pytest.fail("the source is written to"))
    assert ingest(place.url, store).rows == 10
    assert [(entry.path, entry.tag, entry.modified) for entry in place.store.list()] == before


def test_a_tar_costs_one_pass_and_a_request_for_each_eight_megabytes(source, store, monkeypatch):
    monkeypatch.setattr("sd3core.data.sources.ranged_file.CHUNK_BYTES", 5000)
    tar = tar_of(samples(0, 20))
    source.put("a.tar", tar)
    recipe = recipe_of(source.url)
    ranges: list[tuple[int, int]] = []
    really = FileStore.get_range

    def counted(self, path, offset, length):
        if path == "a.tar":
            ranges.append((offset, length))
        return really(self, path, offset, length)

    monkeypatch.setattr(FileStore, "get_range", counted)
    monkeypatch.setattr("workers.ingest_units.check_source", lambda *_: None)
    ingest_stage(recipe, store, ignore_progress)
    assert len(ranges) == len({*ranges}) <= -(-len(tar) // 5000)
    assert sum(length for _, length in ranges) <= len(tar)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_run_that_is_killed_at_any_write_goes_on(kind, source, store, tmp_path, monkeypatch):
    """Before every object that it writes: the same command makes the rest, and what an undisturbed run makes."""
    if kind == "webdataset":
        source.put("a.tar", tar_of(samples(0, 20)))
        source.put("b.tar", tar_of(samples(20, 3)))
    else:
        source.put("a.parquet", parquet_of([{"image": picture(n), "text": f"c {n}"} for n in range(20)]))
        source.put("b.parquet", parquet_of([{"image": picture(n), "text": f"c {n}"} for n in range(3)]))
    writes: list[str] = []
    kill_at = -1

    def killed_at_last(really):
        def put(self, path, what):
            if len(writes) == kill_at:
                raise Killed
            writes.append(path)
            really(self, path, what)

        return put

    monkeypatch.setattr(FileStore, "put", killed_at_last(FileStore.put))
    monkeypatch.setattr(FileStore, "put_file", killed_at_last(FileStore.put_file))
    expected, needed = ingest(source.url, store, source=kind).manifest, len(writes)
    assert needed > 15
    for before in range(needed):
        disturbed = open_store(str(tmp_path / f"killed-{before}"))
        writes, kill_at = [], before
        with pytest.raises(Killed):
            ingest(source.url, disturbed, source=kind)
        kill_at = -1
        result = ingest(source.url, disturbed, source=kind)
        assert result.manifest == expected
        tars = [path for path in writes if path.endswith(".tar")]
        assert len(tars) <= 4 + 1  # the shard that it was killed in is the only one that is made twice


class Killed(BaseException):
    """As a kill, it is caught by nobody."""


def test_a_kill_between_two_shards_of_a_tar_makes_only_the_rest(source, store, monkeypatch):
    source.put("a.tar", tar_of(samples(0, 20)))
    made: list[str] = []
    really = ingest_unit.write_shard

    def counted(store, folder, stem, *rest, **more):
        if len(made) == 2 and not calls_left:
            raise KeyboardInterrupt
        made.append(stem)
        return really(store, folder, stem, *rest, **more)

    calls_left: list[int] = []
    monkeypatch.setattr(ingest_unit, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        ingest(source.url, store)
    calls_left.append(1)
    result = ingest(source.url, store)
    assert len(made) == 3 and result.rows == 20 and result.made == 1


def test_urls_name_files_patterns_and_folders(source, store, tmp_path):
    """The first base's names have no label, so that data may move; an entry added at the end renames nothing."""
    for number in range(4):
        source.put(f"{number:05d}.tar", tar_of(samples(10 * number, 2)))
    other = SourceFolder(str(tmp_path / "more"))
    other.put("00001.tar", tar_of(samples(90, 3)))
    by_pattern = ingest(f"{source.url}/{{00000..00003}}.tar", store)
    by_folder = ingest(f"file://{source.url}", open_store(str(tmp_path / "a")))
    one_by_one = ingest([f"{source.url}/{n:05d}.tar" for n in range(4)], open_store(str(tmp_path / "b")))
    assert by_pattern.manifest == by_folder.manifest == one_by_one.manifest
    twice = ingest([source.url, f"{source.url}/00002.tar", f"{source.url}/{{00001,00002}}.tar"], store)
    assert twice.manifest == by_pattern.manifest and twice.skipped
    both = ingest([source.url, other.url], store)
    assert stems(store, both) > stems(store, by_pattern) and both.rows == 11 and both.made == 1
    assert both.reason.startswith("1 tar added: 1 of 5 shards; ")
    assert {name for name in rows_of(store, both) if "more:" in name} == {
        f"more:00001.tar/{n:09d}" for n in (90, 91, 92)
    }
    (tmp_path / "source").rename(tmp_path / "moved")
    moved = ingest([str(tmp_path / "moved"), other.url], store)
    assert moved.manifest == both.manifest


def test_a_file_that_a_pattern_names_and_that_is_not_there_is_counted_and_looked_for_again(either_source, store):
    source = either_source
    source.put("00000.tar", tar_of(samples(0, 3)))
    url = f"{source.url}/{{00000..00002}}.tar"
    missing = ingest(url, store)
    assert manifest_of(store, missing).failed_reasons == {"data.urls names it, and it is not there": 2}
    assert "2 images left out: data.urls names it, and it is not there: 00001.tar, 00002.tar" in missing.warnings
    source.put("00001.tar", tar_of(samples(10, 3)))
    assert ingest(url, store).rows == 6


def test_files_that_are_not_there_say_nothing_of_the_others(source, store):
    source.put("00005.tar", tar_of(samples(0, 3)))
    result = ingest(f"{source.url}/{{00000..00005}}.tar", store)
    assert result.rows == 3
    assert manifest_of(store, result).failed_reasons == {"data.urls names it, and it is not there": 5}


WRONG_URLS = {
    "hdfs://x/a.tar": "is a URL of another kind: take a whole path, file:// or s3://",
    "tars": "is relative, and workers run in folders of their own",
    "/nowhere/at/all": "data.urls /nowhere/at/all: no such folder, or it holds no .tar; name another",
    "/nowhere/a.tar": "data.urls /nowhere/a.tar: no such file",
    "/nowhere/*.tar": "data.urls /nowhere/*.tar: * and ? are no pattern here; name the folder, or write {0000..0123}",
    "/nowhere/{0..2}.tar": "data.urls /nowhere/{0..2}.tar: none of its 3 files is there, the first is /nowhere/0.tar",
    "/nowhere/{2..0}.tar": "data.urls /nowhere/{2..0}.tar: {2..0} counts from a smaller number to a larger",
    "/nowhere/{0..9999999}.tar": "of a million names",
    "/nowhere/{0..999}{0..9999}.tar": "10,000,000 names, more than 1,000,000; name the folder instead",
    "/nowhere/{a}.tar": "{a} is neither {0000..0123} nor {a,b}",
    "/nowhere/{a{b,c}}.tar": "braces that do not close, or stand in others",
    "s3://{a,b}/x.tar": "a bucket's name takes no braces",
    "s3://b{0..1}/x.tar": "a bucket's name takes no braces",
    "/{a,b}/x.tar": "nor a folder's right below /; name each by itself",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_a_wrong_url_is_one_line(url, store):
    with pytest.raises(UserError) as error:
        ingest(url, store)
    assert WRONG_URLS[url] in str(error.value) and "\n" not in str(error.value)


def test_urls_belong_to_their_sources():
    for overrides in (["data.source=webdataset"], ["data.urls=/x"]):
        with pytest.raises(UserError, match="data.urls names the files of webdataset or parquet, and of no other"):
            load_recipe("tiny-test", overrides)
    assert load_recipe("tiny-test", ["data.source=parquet", "data.urls=/x", "caption.captioner=none"]).data.urls == (
        "/x",
    )


def test_fields_are_named_in_the_recipe(source, store):
    members = []
    for number in range(6):
        about = f'{{"meta": {{"alt": "alt {number}"}}, "tags": ["tag {number}", "more"]}}'.encode()
        members += [(f"{number}.mask.png", picture(99)), (f"{number}.webp", picture(number, "WEBP"))]
        members += [(f"{number}.jpg", picture(50 + number, "JPEG")), (f"{number}.json", about)]
    source.put("a.tar", tar_of(members))
    chosen = ["data.image_field=webp", 'data.caption_fields=["json.meta.alt", "json.tags"]']
    result = ingest(source.url, store, *chosen)
    entry = manifest_of(store, result).shards[0]
    found = dict(read_raw_samples(store, result.manifest.folder, entry.stem))
    assert all({"webp", "json"} == files.keys() for files in found.values()) and result.rows == 6
    captions = sorted(row["captions"] for row in rows_of(store, result).values())
    assert captions == [[f"alt {n}", f"tag {n}", "more"] for n in range(6)]  # all that are named are kept
    plain = ingest(source.url, store, "data.caption_fields=json.meta.alt")
    assert (
        "6 samples with several images, one of which is taken (data.image_field names which): a.tar/0, "
        in "\n".join(plain.warnings)
    )


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "data.caption_fields=json.alt",
            "no caption in json.alt (name its place in data.caption_fields, or a captioner",
        ),
        ("data.image_field=tif", "no member .tif (data.image_field)"),
    ],
)
def test_a_field_that_no_row_has_ends_the_stage_before_all_is_read(override, line, source, store, opened):
    for number in range(10):
        source.put(f"{number}.tar", tar_of(samples(10 * number, 40)))
    with pytest.raises(DataError) as error:
        ingest(source.url, store, override)
    assert line in str(error.value) and len(opened) == 3 and not store.list("datasets")


def test_a_source_without_any_usable_image_is_an_error_each_time(source, store):
    source.put("a.tar", tar_of([("a.jpg", b"no image"), ("a.txt", b"words")]))
    for _ in range(2):
        with pytest.raises(DataError, match=r"no usable image \(1 rejected: not an image that can be read"):
            ingest(source.url, store)
    source.put("b.tar", tar_of(samples(0, 1)))
    assert ingest(source.url, store).rows == 1


def test_what_changes_while_it_is_read_fails_and_is_no_reject(source, store, monkeypatch):
    """As a file that somebody still writes to: the shard's name would be that of other bytes."""
    source.put("a.tar", tar_of(samples(0, 3)))
    source.put("b.tar", tar_of(samples(10, 3)))
    really = RangedFile.check

    def written_to(self):
        if self.position:
            source.put("b.tar", tar_of(samples(20, 3)), LONG_AGO_S + 9)
        really(self)

    with monkeypatch.context() as patch:
        patch.setattr(RangedFile, "check", written_to)
        with pytest.raises(StageFailed, match=r"/b.tar \(file://.*b.tar changed since it was listed; run ingest again"):
            ingest(source.url, store)
    result = ingest(source.url, store)
    assert result.rows == 6 and "b.tar/000000020" in rows_of(store, result)


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_a_store_that_is_away_rejects_nothing(kind, source, store, monkeypatch):
    rows = [{"image": picture(n), "text": f"c {n}"} for n in range(3)]
    source.put("a.tar", tar_of(samples(0, 3)))
    source.put("a.parquet", parquet_of(rows))

    def away(*_):
        raise StoreError("s3://x: cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr("workers.ingest_units.check_source", lambda *_: None)
        patch.setattr("sd3core.data.sources.ranged_file.RangedFile._chunk", away)
        with pytest.raises(StageFailed, match=r"s3://x: cannot be reached"):
            ingest(source.url, store, source=kind)
    assert ingest(source.url, store, source=kind).rows == 3


@pytest.mark.parametrize("harm", ["gone", "denied"])
def test_a_file_that_vanishes_or_is_denied_costs_its_rows_and_is_looked_at_again(harm, source, store, monkeypatch):
    source.put("a.tar", tar_of(samples(0, 20)))
    source.put("b.tar", tar_of(samples(20, 3)))
    really = FileStore.get_range
    error = {"gone": StoreNotFound("x: no such object"), "denied": StoreDenied("x: access denied")}[harm]

    def harmed(self, path, offset, length):
        if path == "b.tar":
            raise error
        return really(self, path, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "get_range", harmed)
        result = ingest(source.url, store)
    reason = {"gone": "vanished since it was listed", "denied": "access to it is denied"}[harm]
    assert manifest_of(store, result).failed_reasons == {reason: 1} and result.rows == 20
    again = ingest(source.url, store)
    assert again.rows == 23 and again.reason.startswith("1 tar changed: 1 of 4 shards; ")


def test_credentials_that_run_out_are_no_reject(source, store, s3_bucket, monkeypatch):
    """A HEAD says 403 to them as to an object that is not to be read; what a GET says then tells them apart."""
    place = SourceFolder(f"s3://{s3_bucket}/tars")
    place.put("a.tar", tar_of(samples(0, 3)))
    monkeypatch.setattr("workers.ingest_units.check_source", lambda *_: None)

    def denied(*_):
        raise StoreDenied("s3://x: access denied (403)")

    def expired(*_):
        raise StoreError("s3://x: access denied (ExpiredToken)")

    monkeypatch.setattr(S3Store, "entry", denied)
    with monkeypatch.context() as patch:
        patch.setattr(S3Store, "get_range", expired)
        with pytest.raises(StageFailed, match="ExpiredToken"):
            ingest(place.url, store)
    with pytest.raises(DataError, match=r"no usable image \(1 rejected: access to it is denied\)"):
        ingest(place.url, store)


# ---- parquet


def image_struct(number: int, path: str | None = None) -> dict:
    return {"bytes": picture(number), "path": path}


PARQUET_FORMS = {
    "bytes": [{"jpg": picture(n), "caption": f"c {n}"} for n in range(20)],
    "struct": [{"image": image_struct(n, f"{n}.png"), "text": f"c {n}"} for n in range(20)],
    "keys": [{"key": f"{n:09d}", "image": picture(n), "caption": f"c {n}"} for n in range(20)],
    "lists": [{"image": picture(n), "captions": [f"c {n}", "more"]} for n in range(20)],
}


@pytest.mark.parametrize("form", PARQUET_FORMS)
def test_a_parquets_rows(form, either_source, store, opened):
    source = either_source
    source.put("train/0.parquet", parquet_of(PARQUET_FORMS[form]))
    result = ingest(source.url, store, source="parquet")
    assert sorted(row["caption"] for row in rows_of(store, result).values()) == sorted(f"c {n}" for n in range(20))
    assert [entry.rows for entry in manifest_of(store, result).shards] == [8, 8, 4]
    opened.clear()
    assert ingest(source.url, store, source="parquet").skipped and not opened
    rows = list(PARQUET_FORMS[form])
    rows[9] = {name: "another caption" if name in ("caption", "text") else value for name, value in rows[9].items()}
    source.put("train/0.parquet", parquet_of(rows), LONG_AGO_S + 1)
    before = {row["key"] for row in rows_of(store, result).values()}
    kept = [row.get("captions") for row in rows_of(store, result).values()]
    assert sum(len(captions or ()) for captions in kept) == (40 if form == "lists" else 0)
    changed = ingest(source.url, store, source="parquet")
    assert {row["key"] for row in rows_of(store, changed).values()} == before and changed.made == (form != "lists")


def test_row_groups_stay_whole_and_a_broken_one_costs_its_rows(either_source, store):
    """A run of small groups is a shard; a group that is larger than a shard becomes several."""
    rows = [{"image": picture(n), "caption": f"c {n}"} for n in range(60)]
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pq.ParquetWriter(sink, table.schema, compression="zstd", write_page_checksum=True) as writer:
        for start, stop in ((0, 3), (3, 6), (6, 10), (10, 30), (30, 33), (33, 40), (40, 60)):
            writer.write_table(table.slice(start, stop - start))
    data = bytearray(sink.getvalue())
    group = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(5)
    column = group.column(0)
    place = column.data_page_offset + column.total_compressed_size // 2
    data[place : place + 40] = b"\xff" * 40
    either_source.put("a.parquet", bytes(data))
    result = ingest(either_source.url, store, source="parquet")
    manifest = manifest_of(store, result)
    assert manifest.failed_reasons == {"its row group cannot be read": 7} and result.rows == 53
    sizes = [entry.rows + sum(entry.failed.values()) for entry in manifest.shards]
    assert sizes == [6, 4, 8, 8, 7, 7, 8, 8, 4]
    assert "1 parquet file damaged, and read as far as that goes: a.parquet (row group 5)" in result.warnings


def test_rows_name_images_by_path(either_source, store, tmp_path):
    source = either_source
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(picture(77))
    source.put("data/images/a.png", picture(1))
    source.put("secret.png", picture(2))
    paths = {
        "images/a.png": "", "./images/a.png": "", str(elsewhere): "",
        "images/none.png": "its path names no file",
        "../secret.png": "its path leads out of the parquet file's folder",
        "https://x/a.png": "its path is a URL that is not read (s3:// is)",
        "": "no image in its row",
    }  # fmt: skip
    if source.url.startswith("s3://"):
        paths[f"{source.url}/secret.png"] = ""
    rows = [{"path": path, "caption": f"c {n}"} for n, path in enumerate(paths)]
    source.put("data/a.parquet", parquet_of(rows))
    result = ingest(source.url, store, source="parquet")
    reasons = list(filter(None, paths.values()))
    assert manifest_of(store, result).failed_reasons == {reason: 1 for reason in sorted(reasons)}
    assert result.rows == len(paths) - len(reasons)
    source.put("data/images/none.png", picture(3))
    assert ingest(source.url, store, source="parquet").rows == result.rows + 1


def test_a_parquet_without_the_columns_is_one_line(source, store):
    source.put("a.parquet", parquet_of([{"url": "https://x/1", "caption": "c"}]))
    with pytest.raises(DataError) as error:
        ingest(source.url, store, source="parquet")
    assert "for image bytes or paths (data.image_field); it has url, caption" in str(error.value)
    source.put("b.parquet", parquet_of([{"image": picture(n), "caption": "c"} for n in range(3)]))
    source.put("c.parquet", b"PAR1 and no more")
    result = ingest(source.url, store, source="parquet")
    assert result.rows == 3 and sorted(manifest_of(store, result).failed_reasons.values()) == [1, 1]
    with pytest.raises(DataError, match=r"no column alt \(data\.caption_fields\); it has "):
        ingest(source.url, store, "data.caption_fields=alt", source="parquet")


# ---- behind ingest


def test_only_new_rows_of_a_tar_meet_a_model(source, tmp_path, monkeypatch):
    """A row put in front moves every row of the tar by one: those that go into the next shard are found in the one before."""
    seen = count_models(monkeypatch, tmp_path)
    store = open_store(str(tmp_path / "store"))
    more = ["caption.captioner=vision_language_model", "caption.model=/model", "encode.batch=4"]
    recipe = recipe_of(source.url, *more)

    def run() -> None:
        raw = ingest_stage(recipe, store, ignore_progress)
        captions = caption_stage(recipe, store, raw.manifest, ignore_progress)
        parts = encode_all(recipe, store, raw.manifest, captions.manifest, TOWERS)
        numbers = [entry.number for entry in manifest_of(store, raw).shards]
        for result in (captions, *parts.values()):
            assert [entry.number for entry in manifest_of(store, result).shards] == numbers

    source.put("a.tar", tar_of(samples(0, 20)))
    run()
    assert seen.take() == (20, 20, 40)
    source.put("b.tar", tar_of(samples(50, 5)))
    run()
    assert seen.take() == (5, 5, 10)
    source.put("a.tar", tar_of([*sample("first", 99, "number 99"), *samples(0, 20)]), LONG_AGO_S + 1)
    run()
    assert seen.take() == (1, 1, 2)
    source.delete("b.tar")
    run()
    assert seen.take() == (0, 0, 0)


def test_done_records_name_the_rows_that_are_left_out(source, store):
    source.put("a.tar", tar_of([*samples(0, 2), ("x.jpg", b"none"), ("x.txt", b"words")]))
    result = ingest(source.url, store)
    (entry,) = manifest_of(store, result).shards
    assert [row.key for row in read_shard_done(store, result.manifest.folder, entry.stem).failed] == ["a.tar/x"]
