"""A manifest says that a stage is done; each one that was ever committed can be read by its digest."""

from __future__ import annotations

import pytest

from sd3core.data.manifest import (
    Manifest,
    ManifestRef,
    ShardEntry,
    commit_manifest,
    explain_difference,
    is_whole,
    read_head,
    read_manifest,
)
from sd3core.errors import DataError

FOLDER = "datasets/d/latents/spec"


def _manifest(shards: int = 2) -> Manifest:
    entries = [
        ShardEntry(
            number=n, stem=f"{n:05d}.aaaaaaaaaaaa", rows=10 + n, failed={"empty file": 1}, bytes=100, digest="d" * 64,
            index_digest="e" * 64, buckets={"64x64": 6, "64x48": 4 + n},
        )
        for n in range(shards)
    ]  # fmt: skip
    return Manifest(
        stage="latents", spec="0" * 12, fields={"side_px": 64}, inputs={"raw": "f" * 64}, folder=FOLDER, shards=entries
    )


def test_totals():
    manifest = _manifest()
    assert (manifest.rows, manifest.bytes) == (21, 200)
    assert manifest.buckets == {"64x48": 9, "64x64": 12} and manifest.failed_reasons == {"empty file": 2}


def test_digest_is_that_of_the_stored_bytes_and_fixed_for_ever():
    assert _manifest().digest == "906261951ffa8a1bd411dc14ea35947f947e345d2fa2c90580ffb0f05acf508f"
    assert _manifest(3).digest != _manifest().digest


def test_commit_and_read(store):
    first, second = _manifest(2), _manifest(3)
    ref = commit_manifest(store, FOLDER, first)
    assert ref == ManifestRef(FOLDER, first.digest)
    assert ref.path == f"{FOLDER}/MANIFEST.{first.digest[:12]}.json" and store.exists(ref.path)
    later = commit_manifest(store, FOLDER, second)
    assert read_manifest(store, FOLDER) == second
    # whatever was added since
    assert read_manifest(store, FOLDER, ref.digest) == read_manifest(store, ref.path) == first
    assert read_manifest(store, later.path, later.digest) == second
    assert commit_manifest(store, FOLDER, first) == ref and read_manifest(store, FOLDER) == first


def test_what_is_not_the_manifest_asked_for_is_refused(store):
    with pytest.raises(DataError, match="no such manifest; the stage that makes it is not finished"):
        read_manifest(store, FOLDER)
    commit_manifest(store, FOLDER, _manifest())
    with pytest.raises(DataError, match="no such manifest"):
        read_manifest(store, FOLDER, "0" * 64)
    with pytest.raises(DataError, match="not the manifest that was asked for"):
        read_manifest(store, f"{FOLDER}/MANIFEST.json", "0" * 64)


DAMAGES = [None, lambda data: data[:-10], lambda data: b"", lambda data: data.replace(b'"rows": 10', b'"rows": 11')]


def harm(store, path, damage):
    if damage is None:
        store.delete(path)
    else:
        store.put(path, damage(store.get(path)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_is_gone_or_altered_is_written_again_from_the_newest(store, damage):
    manifest = _manifest()
    ref = commit_manifest(store, FOLDER, manifest)
    assert is_whole(store, manifest)
    harm(store, ref.path, damage)
    assert not is_whole(store, manifest)
    assert read_manifest(store, FOLDER, ref.digest) == manifest and is_whole(store, manifest)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_copy_that_the_newest_is_not_is_refused(store, damage):
    ref = commit_manifest(store, FOLDER, _manifest())
    commit_manifest(store, FOLDER, _manifest(3))
    harm(store, ref.path, damage)
    with pytest.raises(
        DataError, match="no such manifest; .*to be run again|not a manifest of this|not the manifest that was"
    ):
        read_manifest(store, FOLDER, ref.digest)


def test_differences_are_told_by_key():
    old = {"format": 1, "text": {"t5_tokens": 16, "padding": "trimmed"}, "gone": 1, "same": [1, 2]}
    new = {"format": 1, "text": {"t5_tokens": 20, "padding": "trimmed"}, "more": {"x": None}, "same": [1, 2]}
    assert explain_difference(old, new) == ["gone: 1 -> unset", "more.x: unset -> None", "text.t5_tokens: 16 -> 20"]
    assert explain_difference(old, old) == [] == explain_difference({"a": {}}, {"a": {}})
    assert explain_difference({"a": {}}, {"a": {"b": 1}}) == ["a.b: unset -> 1"]


def test_the_head_of_a_manifest_is_read_without_its_shards(store):
    commit_manifest(store, FOLDER, _manifest(2_000))
    asked = []
    get_range = type(store).get_range
    store.get_range = lambda path, offset, length: asked.append(length) or get_range(store, path, offset, length)
    store.get = None
    head = read_head(store, f"{FOLDER}/MANIFEST.json")
    assert (head.fields, head.inputs) == (_manifest().fields, _manifest().inputs)
    assert asked == [1 << 16] and store.size(f"{FOLDER}/MANIFEST.json") > asked[0]


@pytest.mark.parametrize("data", [None, b"", b"{}", b'{"fields": {"a": 1', b'{"fields": 3}'])
def test_what_is_no_manifest_has_no_head(store, data):
    if data is not None:
        store.put(f"{FOLDER}/MANIFEST.json", data)
    assert read_head(store, f"{FOLDER}/MANIFEST.json") is None
