"""The store on a real S3 server (`make test-s3`), whose clients and processes die, and whose line is bad."""

from __future__ import annotations

import hashlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress

import pytest

from sd3core.data.store import StoreEntry, open_store, s3
from sd3core.errors import StoreError

pytestmark = [pytest.mark.real_s3, pytest.mark.slow]

LARGE = 48 << 20  # in parts of 8 MiB each
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.fixture
def swift(s3_server):
    assert s3_server.swift, "these tests need a real S3 server: make test-s3"
    yield s3_server.swift
    s3_server.swift.start()  # whatever a test has killed


@pytest.fixture
def store(swift, s3_bucket):
    return open_store(f"s3://{s3_bucket}/a/prefix")


def content(number: int, size: int = LARGE) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (size // 32)


WRITER = """
import sys
from pathlib import Path
from sd3core.data.store import open_store
store, number = open_store(sys.argv[1]), 0
print("begun", flush=True)
while True:
    for path in sys.argv[2:]:
        store.put_file("large", Path(path))
        store.put("small", Path(path).read_bytes()[:300_000])
"""


def test_a_client_that_is_killed_in_half_sent_uploads_leaves_old_or_new(store, tmp_path):
    """Killed 8 times, anywhere in uploads of 48 MiB in parts and of 300 kB at once."""
    for number in range(2):
        (tmp_path / str(number)).write_bytes(content(number))
    store.put_file("large", tmp_path / "0")
    store.put("small", content(0)[:300_000])
    for kill in range(8):
        command = [sys.executable, "-c", WRITER, store.url, str(tmp_path / "1"), str(tmp_path / "0")]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"begun\n"
        time.sleep(random.Random(kill).uniform(0, 1.5))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert store.get("large") in (content(0), content(1))
        assert store.get("small") in (content(0)[:300_000], content(1)[:300_000])
        assert [(entry.path, entry.size) for entry in store.list()] == [("large", LARGE), ("small", 300_000)]


@pytest.mark.parametrize("process", ["proxy", "object", "container"])
def test_a_server_that_is_killed_while_it_takes_an_upload(store, swift, tmp_path, process):
    """And is back two seconds later: the upload ends well or in one line; the same call ends well then, and meanwhile there is
    the old object, or nothing.
    """
    (tmp_path / "new").write_bytes(content(1))
    store.put("object", content(0, 1 << 20))
    ended: list[StoreError | None] = []

    def upload() -> None:
        try:
            ended.append(store.put_file("object", tmp_path / "new"))
        except StoreError as error:
            ended.append(error)

    uploading = threading.Thread(target=upload)
    uploading.start()
    time.sleep(0.3)
    swift.kill(process)
    time.sleep(2)
    swift.start()
    uploading.join()
    [error] = ended
    if error is None:
        assert store.get("object") == content(1)
    else:
        assert str(error).startswith(store.url) and "\n" not in str(error)
        assert store.get("object") == content(0, 1 << 20)
    store.put_file("object", tmp_path / "new")
    assert store.get("object") == content(1)


@pytest.mark.parametrize("process", ["proxy", "object"])
def test_a_server_that_is_killed_while_it_answers(store, swift, process):
    store.put("object", content(0))
    killing = threading.Timer(0.05, swift.kill, [process])
    back = threading.Timer(1.0, swift.start)
    for timer in (killing, back):
        timer.start()
    with suppress(StoreError):
        for _ in range(20):
            assert store.get("object") == content(0)
    for timer in (killing, back):
        timer.join()
    assert store.get("object") == content(0)


class BadLine:
    """Forwards connections to the server. `faults` has what happens to those that come next, one each:

    "busy"        answered with 503 at once
    a number      the line breaks after so many bytes of the answer
    "stall"       nothing of the answer comes
    """

    def __init__(self, port: int) -> None:
        self.port, self.faults = port, deque()
        self.met: list[str | int] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._connection, args=(client,), daemon=True).start()

    def _connection(self, client: socket.socket) -> None:
        fault = self.faults.popleft() if self.faults else None
        with client, suppress(OSError):
            if fault == "busy":
                client.recv(1 << 16)
                self.met.append(fault)
                client.sendall(BUSY)
                return
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                threading.Thread(target=self._pump, args=(client, server, None), daemon=True).start()
                self._pump(server, client, fault)

    def _pump(self, source: socket.socket, sink: socket.socket, fault: str | int | None) -> None:
        left = fault if isinstance(fault, int) else None
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if fault == "stall":
                    self.met.append(fault)
                    time.sleep(3)
                    return
                if left is not None and len(data) >= left:
                    self.met.append(fault)
                    sink.sendall(data[:left])
                    sink.shutdown(socket.SHUT_RDWR)
                    return
                left = left - len(data) if left is not None else None
                sink.sendall(data)


@pytest.fixture
def line(swift, monkeypatch):
    made = BadLine(swift.ports["proxy"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    monkeypatch.setattr(s3, "READ_TIMEOUT_S", 1)
    yield made
    made.close()


@pytest.mark.parametrize(
    "faults",
    [["busy"] * 4, ["stall", "stall"], [0, 100, 5_000_000], [700_000, "busy", "stall", 3_000_000]],
    ids=["storm of 503", "stalls", "cut bodies", "all of it"],
)
def test_a_bad_line_changes_nothing_but_the_time(store, line, tmp_path, faults):
    (tmp_path / "file").write_bytes(content(1, 20 << 20))
    for use, expected in (
        (lambda there: there.put("small", b"1" * 1000), None),
        (lambda there: there.put_file("large", tmp_path / "file"), None),
        (lambda there: there.get("large"), content(1, 20 << 20)),
        (lambda there: there.get_range("large", 7 << 20, 9 << 20), content(1, 20 << 20)[7 << 20 : 16 << 20]),
        (lambda there: there.get_file("large", tmp_path / "back"), None),
        (lambda there: there.list(), [StoreEntry("large", 20 << 20), StoreEntry("small", 1000)]),
    ):
        line.faults.extend(faults)
        through = open_store(store.url)  # with connections of its own
        got = use(through)
        assert expected is None or got == expected
        line.faults.clear()
    assert (tmp_path / "back").read_bytes() == content(1, 20 << 20)
    assert {*faults[:1]} <= {*line.met}


def test_a_line_that_stays_bad_is_one_line(store, line):
    line.faults.extend(["busy"] * 100)
    with pytest.raises(StoreError, match=rf"^{re.escape(store.url)}.*") as error:
        open_store(store.url).get("x")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_told(store, monkeypatch, name):
    store.put("x", b"1")
    monkeypatch.setenv(name, "wrong")
    for use in (lambda: open_store(store.url).get("x"), lambda: open_store(store.url).list()):
        with pytest.raises(StoreError, match=r": access denied \(\w+\); check the credentials in the environment$"):
            use()
