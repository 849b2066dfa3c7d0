"""Runs a rank's loader in a process of its own, beside the one that trains.

It reads, checks and packs, and loads neither torch nor a device's library. The two talk over a socket. A batch is a
message and an open file of memory without a name, which the rank maps: nothing is copied, and nothing is left when both
are gone, however they end. The loader's process ends at once when the rank does.
"""

from __future__ import annotations

import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from sd3core.data.batch_bytes import BatchLayout, PackedBatch
from sd3core.data.loader import BatchLoader
from sd3core.data.loader_settings import LoaderSettings, open_loader
from sd3core.errors import UserError, error_in_one_line

if TYPE_CHECKING:
    from sd3core.data.batch import Batch

LENGTH = struct.Struct("<Q")  # of a message, before it
MOST_FILES = 253  # that Linux passes with a message
LOOKS_EVERY_MS = 5000  # whether the rank is still there, where a copy of it holds its socket
ENDS_WITHIN_S = 5.0
# Rows are freed as soon as they are packed: whatever is large goes back to the system then.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 17)}


class LoaderLost(Exception):
    """A loader's process has died: what another start of the rank mends."""


class LoaderProcess:
    """A `BatchLoader` in another process: the same calls, batches and errors. `warnings`: what its user should hear.

    Its own process dying is a LoaderLost of one line. Threads may share it; they take turns.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self._lock = threading.Lock()
        self._rank = settings.rank
        self._channel, its_end = socket.socketpair()
        start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve_rank; serve_rank(*map(int, sys.argv[1:]))"
        with its_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", start, str(its_end.fileno()), str(os.getpid())],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL,
                pass_fds=[its_end.fileno()],
                start_new_session=True,  # Ctrl-C is the rank's, with which it ends
            )
        self.close = weakref.finalize(self, _end, self._channel, self._process)
        self.warnings: list[str] = self._ask(settings)[0]

    @property
    def pid(self) -> int:
        return self._process.pid

    def batch(self, step: int, part: int = 0) -> Batch:
        [batch] = self._batches("packed", step, part)
        return batch

    def samples(self, wanted: Iterable[tuple[int, str]]) -> list[Batch]:
        return self._batches("packed_samples", list(wanted))

    def _batches(self, *request: Any) -> list[Batch]:
        from sd3core.data.batch import unpacked  # here: the process that reads imports this file too

        layouts, files = self._ask(request)
        return [unpacked(layout, _mapped(file, layout)) for layout, file in zip(layouts, files, strict=True)]

    def _ask(self, request: Any) -> tuple[Any, list[int]]:
        """The answer, and the files that came with it."""
        with self._lock:
            try:
                _send(self._channel, request)
                (failed, answer), files = _receive(self._channel)
            except (EOFError, OSError):
                raise LoaderLost(self._how_it_ended()) from None
            except BaseException:  # an answer that nobody takes would be taken for the next one's
                self.close()
                raise
        if failed:
            raise answer
        return answer, files

    def _how_it_ended(self) -> str:
        self.close()
        code = self._process.returncode
        if code >= 0:
            return f"the loader's process of rank {self._rank} ended with exit code {code}; its log says why"
        name = signal.Signals(-code).name
        mend = "; where memory has run out, lower compute.decoded_gb" if code == -signal.SIGKILL else ""
        return f"the loader's process of rank {self._rank} was ended by {name}{mend}"


class SharedBuffer:
    """A batch's buffer in a file of memory without a name, which is gone when nobody has it open."""

    def __init__(self, size: int) -> None:
        self.file = _memory_file()
        weakref.finalize(self, os.close, self.file)
        os.ftruncate(self.file, max(1, size))

    def write(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self.file, data, offset)
            data, offset = data[written:], offset + written


def serve_rank(descriptor: int, rank: int) -> None:
    """The loader's process: answers what comes by the socket until its other end, the process `rank`, is gone."""
    channel = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with, args=(channel, rank), daemon=True).start()
    with suppress(EOFError, OSError):
        settings, _ = _receive(channel)
        loader = None
        try:
            loader, warnings = open_loader(settings, SharedBuffer)
            _send(channel, (False, warnings))
        except Exception as error:
            _send(channel, (True, _portable(error)))
        while loader is not None:
            request, _ = _receive(channel)
            _answer(channel, loader, *request)
    os._exit(0)  # whatever its threads are at


def _answer(channel: socket.socket, loader: BatchLoader, name: str, *arguments: Any) -> None:
    try:
        found = getattr(loader, name)(*arguments)
    except Exception as error:
        _send(channel, (True, _portable(error)))
        return
    batches: list[PackedBatch] = found if isinstance(found, list) else [found]
    layouts = [batch.layout for batch in batches]
    _send(channel, (False, layouts), [batch.buffer.file for batch in batches])


def _end_with(channel: socket.socket, rank: int) -> None:
    """Ends this process with the other end of the channel, whatever it is at."""
    ends = select.poll()
    ends.register(channel, 0)  # only that the other end is closed
    while not ends.poll(LOOKS_EVERY_MS) and os.getppid() == rank:
        pass
    os._exit(0)


def _end(channel: socket.socket, process: subprocess.Popen) -> None:
    with suppress(OSError):
        channel.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer, too
    channel.close()
    try:
        process.wait(ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _send(channel: socket.socket, message: Any, files: Sequence[int] = ()) -> None:
    data = pickle.dumps(message)
    if files:
        socket.send_fds(channel, [LENGTH.pack(len(data))], list(files))
    else:
        channel.sendall(LENGTH.pack(len(data)))
    channel.sendall(data)


def _receive(channel: socket.socket) -> tuple[Any, list[int]]:
    """A message and the files that came with it. EOFError where the other end is gone."""
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # else programs that a rank starts would hold them
    head, files, _, _ = socket.recv_fds(channel, LENGTH.size, MOST_FILES, flags)
    head += _exactly(channel, LENGTH.size - len(head))
    return pickle.loads(_exactly(channel, *LENGTH.unpack(head))), files


def _exactly(channel: socket.socket, size: int) -> bytearray:
    data, have = bytearray(size), 0
    while have < size:
        got = channel.recv_into(memoryview(data)[have:])
        if not got:
            raise EOFError
        have += got
    return data


def _portable(error: Exception) -> Exception:
    """The error as the rank will raise it; one that nobody expects says where it came from."""
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error_in_one_line(error)}")
    if not isinstance(error, UserError):
        error.add_note(f"in the loader's process:\n{traceback.format_exc().strip()}")
    return error


def _mapped(file: int, layout: BatchLayout) -> mmap.mmap:
    try:
        return mmap.mmap(file, max(1, layout.size), mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    finally:
        os.close(file)


def _memory_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("batch")
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())
