"""The contract of a store, on files and on S3; then what each kind does when things go wrong."""

from __future__ import annotations

import errno
import http.server
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sd3core.data.store import FileStore, StoreEntry, StoreNotFound, files, open_store, s3
from sd3core.errors import StoreError
from sd3core.files.whole_output import PARTIAL

ESCAPES = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/./b", "a\\b", "a/", f"a/{PARTIAL}b"]


def test_what_is_put_is_got(store):
    store.put("a/b.bin", b"first")
    store.put("a/b.bin", b"second")
    assert store.get("a/b.bin") == b"second"
    assert store.size("a/b.bin") == 6 and store.exists("a/b.bin")
    store.put("empty", b"")
    assert store.get("empty") == b"" and store.size("empty") == 0


def test_a_version_is_another_one_once_the_object_was_written_anew(store):
    store.put("a", b"first")
    before = store.version("a")
    assert before == store.version("a") and before[0] == store.size("a") == 5
    store.put("a", b"other")
    assert store.version("a") != before
    with pytest.raises(StoreNotFound):
        store.version("b")


def test_ranges(store):
    store.put("x", bytes(range(100)))
    assert store.get_range("x", 10, 5) == bytes(range(10, 15))
    assert store.get_range("x", 99, 1) == b"c"
    assert store.get_range("x", 5, 0) == b""
    for offset, length in [(98, 5), (200, 5)]:
        with pytest.raises(StoreError, match="ends before byte"):
            store.get_range("x", offset, length)


def test_files(store, tmp_path):
    big = os.urandom(9 << 20)  # more than one part of a multipart upload
    (tmp_path / "big").write_bytes(big)
    store.put_file("folder/big", tmp_path / "big")
    assert store.size("folder/big") == len(big)
    assert store.get_range("folder/big", (8 << 20) - 3, 6) == big[(8 << 20) - 3 : (8 << 20) + 3]
    store.get_file("folder/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["back", "big"]


def test_missing_objects(store, tmp_path):
    store.put("folder/there", b"")
    for path in ("missing", "folder", "folder/there/below"):
        for read in (
            store.get,
            store.size,
            lambda p: store.get_range(p, 0, 1),
            lambda p: store.get_file(p, tmp_path / "local"),
        ):
            with pytest.raises(StoreNotFound, match="no such object") as error:
                read(path)
            assert "\n" not in str(error.value)
        assert not store.exists(path)
        store.delete(path) if path != "folder" else None
    assert not (tmp_path / "local").exists()


def test_list_is_recursive_sorted_and_by_folder(store):
    assert store.list() == [] and store.list("a") == []
    for path in ("b", "a/2", "a/1", "a/deep/er/3", "ab/4", "a.txt"):
        store.put(path, path.encode())
    assert store.list() == sorted(StoreEntry(p, len(p)) for p in ("b", "a/2", "a/1", "a/deep/er/3", "ab/4", "a.txt"))
    assert [entry.path for entry in store.list("a")] == ["a/1", "a/2", "a/deep/er/3"]
    assert store.list("a/") == store.list("a") and store.list("nothing") == []
    store.delete("a/1")
    assert [entry.path for entry in store.list("a")] == ["a/2", "a/deep/er/3"]


def test_folders_are_named_one_level_deep_and_objects_are_not(store):
    assert store.folders() == store.folders("nothing") == []
    for path in ("b", "a/2", "a/deep/er/3", "a/deep/er/4", "a/flat/1", "ab/4", "a.txt"):
        store.put(path, b"")
    assert store.folders() == ["a", "ab"]
    assert store.folders("a") == store.folders("a/") == ["deep", "flat"]
    assert store.folders("a/deep/er") == store.folders("a/2") == []
    with pytest.raises(StoreError):
        store.folders("../a")


def test_what_consoles_put_for_a_folder_is_no_object(s3_bucket):
    store = open_store(f"s3://{s3_bucket}/a/prefix")
    for key in ("a/prefix/", "a/prefix/x/", "a/prefix/x/y/"):
        store._client().put_object(Bucket=s3_bucket, Key=key, Body=b"")
    store.put("x/y/1", b"1")
    assert store.list() == store.list("x") == [StoreEntry("x/y/1", 1)]


def test_list_reads_every_page(store):
    store.put_json("one/x", 1)
    for number in range(30):
        store.put(f"many/{number:04d}", b"")
    if store.url.startswith("s3"):
        paginator = store._client().get_paginator  # pages of seven instead of a thousand
        store._made.get_paginator = lambda name: _Pages(paginator(name))
    assert len(store.list("many")) == 30


class _Pages:
    def __init__(self, paginator):
        self.paginator = paginator

    def paginate(self, **keywords):
        pages = list(self.paginator.paginate(**keywords, PaginationConfig={"PageSize": 7}))
        assert len(pages) == 5
        return pages


def test_json_is_canonical(store):
    store.put_json("x.json", {"b": [1, 2.5], "a": "ü"})
    assert store.get("x.json") == b'{\n "a": "\\u00fc",\n "b": [\n  1,\n  2.5\n ]\n}\n'
    assert store.get_json("x.json") == {"a": "ü", "b": [1, 2.5]}
    store.put("bad.json", b"{")
    with pytest.raises(StoreError, match="bad.json: not JSON"):
        store.get_json("bad.json")


@pytest.mark.parametrize("path", ESCAPES)
def test_no_path_leaves_the_store(store, path, tmp_path):
    (tmp_path / "local").write_bytes(b"")
    for use in (
        store.get,
        store.size,
        store.delete,
        store.uri,
        lambda p: store.put(p, b""),
        lambda p: store.put_file(p, tmp_path / "local"),
    ):
        with pytest.raises(StoreError, match="store path"):
            use(path)


def test_pickles_by_url(store):
    store.put("x", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url and again.get("x") == b"1"


def test_threads_share_a_store(store):
    again = open_store(store.url)
    threads = [threading.Thread(target=lambda n=n: again.put(f"t/{n}", b"%d" % n)) for n in range(12)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [store.get(entry.path) for entry in store.list("t")] == [b"%d" % n for n in sorted(range(12), key=str)]


def test_a_reader_never_sees_half_a_put(store):
    """One thread replaces an object again and again while another reads it."""
    values = [bytes([n]) * 200_000 for n in range(4)]
    store.put("x", values[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for value in values:
                store.put("x", value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(store.get("x") in values for _ in range(40))
    finally:
        stop.set()
        writer.join()


WRITER = """
import sys, time
from sd3core.data.store import files, open_store
files.os.fsync = lambda handle: (print("written", flush=True), time.sleep(60))  # killed here, before the rename
open_store(sys.argv[1]).put("folder/object", b"new" * 100_000)
"""


def test_a_killed_writer_leaves_nothing_visible(file_store):
    file_store.put("folder/object", b"old")
    process = subprocess.Popen([sys.executable, "-c", WRITER, file_store.url], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list((file_store.root / "folder").iterdir())) == 2  # the hidden leftover
    assert file_store.list() == [StoreEntry("folder/object", 3)]
    assert file_store.get("folder/object") == b"old"


def test_what_killed_writers_left_is_removed_after_an_hour(file_store):
    for name in ("a/object", "b/object"):
        file_store.put(name, b"")
    left = [file_store.root / name for name in (f"a/{PARTIAL}old", f"a/{PARTIAL}new", f"b/{PARTIAL}old")]
    for path in left:
        path.write_bytes(b"half")
        if path.name.endswith("old"):
            os.utime(path, (0, 0))
    file_store.remove_abandoned("a/")
    assert [path.exists() for path in left] == [False, True, True]
    assert file_store.exists("a/object")
    file_store.remove_abandoned("nothing")


def test_uploads_that_lost_their_writer_are_aborted(s3_bucket, monkeypatch):
    import boto3

    client, store = boto3.client("s3"), open_store(f"s3://{s3_bucket}/a/prefix")
    keys = ["a/prefix/runs/x/1.safetensors", "a/prefix/runs/xy/1.safetensors", "a/other"]
    for key in keys:
        client.create_multipart_upload(Bucket=s3_bucket, Key=key)

    def left() -> list[str]:
        return sorted(upload["Key"] for upload in client.list_multipart_uploads(Bucket=s3_bucket).get("Uploads", []))

    with monkeypatch.context() as young:
        young.setattr(s3, "ABANDONED_UPLOAD_S", 1e10)
        store.remove_abandoned("runs/x")
    assert left() == sorted(keys)
    monkeypatch.setattr(s3, "ABANDONED_UPLOAD_S", -60)
    store.remove_abandoned("runs/x/")
    assert left() == sorted(keys[1:])
    open_store(f"s3://none-{s3_bucket}/a").remove_abandoned("runs")  # no bucket: the next request says so


def test_a_full_disk_is_one_line_and_leaves_nothing(file_store, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        StoreError, match=r"/store/x: cannot be written: No space left on device; make room there, and "
    ):
        file_store.put("x", b"data")
    assert list(file_store.root.iterdir()) == []


FILLS_THE_STORE = """
import sys
from sd3core.data.store import open_store
from sd3core.errors import StoreError
store, number = open_store(sys.argv[1]), 0
try:
    while True:
        store.put(f"a/{number}", bytes(100_000))
        number += 1
except StoreError as error:
    assert "/a/" in str(error) and "No space left on device; make room there" in str(error), error
assert number >= 5 and [entry.size for entry in store.list()] == [100_000] * number
assert len(list(store.root.rglob("*"))) == 1 + number
store.delete("a/0")
store.put("a/new", bytes(100_000))
"""


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MB: what was put stays whole, and once there is room the store goes on."""
    mount = (
        f"mount -t tmpfs -o size=1m none {tmp_path} && exec {sys.executable} -c '{FILLS_THE_STORE}' {tmp_path}/store"
    )
    unshared = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshared, f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    done = subprocess.run(
        [*unshared, mount], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr


def test_a_file_where_a_folder_should_be(file_store):
    file_store.put("x", b"")
    with pytest.raises(StoreError, match="x/y: cannot be written: (Not a directory|File exists)"):
        file_store.put("x/y", b"")
    assert file_store.list("x") == []


def test_local_path(file_store, s3_bucket):
    file_store.put("a/x", b"1")
    assert file_store.local_path("a/x").read_bytes() == b"1"
    assert open_store(f"s3://{s3_bucket}").local_path("a/x") is None


def test_kinds_of_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("local/store").url == (tmp_path / "local/store").as_uri()
    assert open_store(str(tmp_path)).url == open_store(f"file://{tmp_path}").url
    assert isinstance(open_store("./a:b"), FileStore)
    assert (
        open_store("s3://bucket/a/b/").url == "s3://bucket/a/b"
        and open_store("s3://bucket").uri("x") == "s3://bucket/x"
    )
    for url in ("http://host/x", "s3:/bucket", "s3://", "s3:///x", "file://host/x", "gs://b", ""):
        with pytest.raises(StoreError, match="s3://bucket/prefix"):
            open_store(url)


@pytest.mark.parametrize("text", ["with space", "hash#", "question?", "per%20cent", "ünïcode"])
def test_folders_with_any_name(tmp_path, text):
    store = open_store(str(tmp_path / text))
    store.put("x", b"1")
    assert open_store(store.url).get("x") == b"1"
    assert (tmp_path / text / "x").is_file()


def test_missing_bucket_is_named(s3_environment, tmp_path):
    store = open_store("s3://no-such-bucket/x")
    (tmp_path / "local").write_bytes(b"1")
    for use in (
        lambda: store.get("a"), lambda: store.size("a"), lambda: store.exists("a"), lambda: store.list(),
        lambda: store.put("a", b""), lambda: store.put_file("a", tmp_path / "local"),
        lambda: store.get_file("a", tmp_path / "b"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket'") as error:
            use()
        assert not isinstance(error.value, StoreNotFound)


def test_unreachable_endpoint_is_named(s3_environment, monkeypatch, tmp_path):
    monkeypatch.setattr(s3, "S3_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "local").write_bytes(b"1")
    store = open_store("s3://bucket")
    for use in (lambda: store.get("a"), lambda: store.list(), lambda: store.put_file("a", tmp_path / "local")):
        with pytest.raises(StoreError, match="s3://bucket: cannot be reached at http://127.0.0.1:9") as error:
            use()
        assert "\n" not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    with pytest.raises(StoreError, match="cannot be reached at not a url"):
        open_store("s3://bucket").get("a")


def test_missing_credentials_are_named(s3_environment, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with pytest.raises(StoreError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        open_store("s3://bucket").get("a")


class _Server(http.server.ThreadingHTTPServer):
    """Answers every GET by `answer(handler, count)`."""

    def __init__(self, answer):
        self.count = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.count += 1
                answer(self, outer.count)

            def log_message(self, *arguments): ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def _send(handler, status, body, length=None):
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True


def test_denied_access_is_one_line(s3_environment, monkeypatch):
    body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    server = _Server(lambda handler, count: _send(handler, 403, body))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for use in (lambda: open_store("s3://bucket").get("a"), lambda: open_store("s3://bucket").list("a")):
        with pytest.raises(StoreError, match=r"s3://bucket/a: access denied \(AccessDenied\); check the credentials"):
            use()
    server.shutdown()


def test_busy_servers_and_broken_bodies_are_tried_again(s3_environment, monkeypatch):
    def answer(handler, count):
        if count == 1:
            _send(handler, 503, b"<Error><Code>SlowDown</Code></Error>")
        elif count == 2:
            _send(handler, 200, b"half", length=8)  # the connection ends in the middle of the body
        else:
            _send(handler, 200, b"complete")

    server = _Server(answer)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    started = time.monotonic()
    assert open_store("s3://bucket").get("a") == b"complete"
    assert server.count == 3 and time.monotonic() - started < 20
    server.shutdown()


LISTING = (
    b'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><KeyCount>1</KeyCount><IsTruncated>false</IsTruncated>'
    b"<Contents><Key>x</Key><Size>3</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents></ListBucketResult>"
)


@pytest.mark.parametrize("cut", ["in the headers", "before the body", "in the body"])
@pytest.mark.parametrize("use", ["list", "get", "get_range", "size", "put"])
def test_an_answer_that_is_cut_short_is_not_taken_for_an_empty_one(s3_environment, monkeypatch, use, cut):
    """The server dies while it answers: boto3 itself would say that there is nothing, or an object of no bytes."""
    body = {"list": LISTING, "get": b"abc", "get_range": b"abc"}.get(use, b"")
    length = 3 if use == "size" else len(body)
    status = b"HTTP/1.1 206 Partial Content\r\n" if use == "get_range" else b"HTTP/1.1 200 OK\r\n"
    whole = status + b"Content-Length: %d\r\nETag: x\r\n\r\n" % length
    ends = {
        "in the headers": status,
        "before the body": whole if body else b"",
        "in the body": whole + body[:-1] if body else b"",
    }
    answers = [ends[cut], ends[cut], whole + body]
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        for answer in answers:
            client, _ = listening.accept()
            with client:
                received = b""
                while not received.endswith((b"\r\n\r\n", b"old")):
                    received += client.recv(1 << 16)
                client.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
    store = open_store("s3://bucket")
    uses = {
        "list": lambda: [entry.path for entry in store.list()] == ["x"],
        "get": lambda: store.get("x") == b"abc",
        "get_range": lambda: store.get_range("x", 5, 3) == b"abc",
        "size": lambda: store.size("x") == 3,
        "put": lambda: store.put("x", b"bold") is None,
    }
    assert uses[use]()
    thread.join(5)
    assert not thread.is_alive()  # it was asked until it had answered whole
    listening.close()


@pytest.mark.parametrize("body", [b"", LISTING[:60], LISTING[:-1]])
def test_a_listing_to_the_connections_end_is_whole_or_asked_for_again(s3_environment, monkeypatch, body):
    """A server that says no length: a body that is empty, or XML that ends in its middle, is none."""
    answers = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + part for part in (body, LISTING)]

    def answer(handler, count):
        handler.wfile.write(answers[count - 1])
        handler.close_connection = True

    server = _Server(answer)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    assert [entry.path for entry in open_store("s3://bucket").list()] == ["x"]
    assert server.count == 2
    server.shutdown()


def test_a_bucket_of_which_no_length_is_told_is_there(s3_environment, monkeypatch):
    answers = [b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 200 OK\r\nDate: x\r\n\r\n"]

    asked = []

    class Head(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.wfile.write(answers[self.path.count("/") == 1])
            self.close_connection = True

        def log_message(self, *arguments): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Head)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    assert not open_store("s3://bucket").exists("x")
    assert asked == ["/bucket/x", "/bucket"]
    server.shutdown()


def test_a_server_that_cuts_every_answer_short_is_one_line(s3_environment, monkeypatch):
    monkeypatch.setattr(s3, "S3_ATTEMPTS", 2)
    server = _Server(lambda handler, count: handler.wfile.write(b"HTTP/1.1 200 OK\r\n"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(StoreError, match=r"^s3://bucket: cannot be reached at .* \(the answer was cut short\)$"):
        open_store("s3://bucket").list()
    server.shutdown()
