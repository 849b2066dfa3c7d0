"""Errors that a user can cause: one line with what is wrong and what mends it."""

import errno
import os

from sd3core.shown_text import printable, shortened

LINE_CHARS = 4_000  # of a message; the longest path has as many
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}
IN_THE_WAY = {errno.EEXIST, errno.EISDIR, errno.ENOTDIR}
NO_RESOURCES = {*NO_SPACE, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EIO}
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "insufficient memory",
)
NOT_A_PLACE = {errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
OF_THE_MACHINE = {*NO_SPACE, *IN_THE_WAY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG}


class UserError(Exception):
    """Something the user can put right. The message is one line; the command line prints it without a traceback.

    It may hold names from outside: as a string (in a terminal, a log, the state of a flow run) it is `printable` and not endless.
    """

    def __str__(self) -> str:
        return shortened(printable(super().__str__()), LINE_CHARS)


class RecipeError(UserError):
    """A recipe, or an override of one, that cannot be used."""


class DataError(UserError):
    """A data set, manifest or stored object that is missing, incomplete or not what it says it is."""


class StoreError(UserError):
    """A store that cannot be reached, read or written."""


class StopStageError(UserError):
    """What all of a stage's work needs is gone or of no use: no other task, worker or attempt would do better."""


class CheckpointError(UserError):
    """A checkpoint whose keys, shapes or files do not fit."""


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error says nothing of what was being read: memory, files or space ran out, or a disk failed.

    Libraries in C say it in words: Pillow's codecs, libavif, torch on a CPU.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in NO_RESOURCES):
        return True
    words = str(error).lower()
    return any(phrase in words for phrase in NO_MEMORY) or "can't start new thread" in words


def error_in_one_line(error: BaseException) -> str:
    """The start of what an error says; its kind where it says nothing."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def described_os_error(error: OSError) -> str | None:
    """What the machine says of a path, or of its disk: what it is and the mend. None for an error that names neither."""
    if error.errno not in OF_THE_MACHINE and not isinstance(error.filename, str | bytes):
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return printable(f"{where}{with_mend(error)}")


def with_mend(error: OSError) -> str:
    """The system's words, and what a user can do about them."""
    words = error.strerror or str(error)
    if error.errno in NO_SPACE:
        return f"{words}; make room there, and the same command goes on"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{words}; give this user the right to it"
    if error.errno in NOT_A_PLACE:
        return f"{words}; name another"
    if error.errno in IN_THE_WAY:
        return f"{words}; name another, or move what is there"
    return words
