"""What may go wrong, by what the user has to do about it, and the exit codes that say so."""

from __future__ import annotations

import errno
from typing import Any, NamedTuple

EXIT_OK, EXIT_BAD_CONFIG, EXIT_FAILURES = 0, 2, 3
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # 128 + the signal, as shells tell it


class Fault(NamedTuple):
    """One thing that is wrong with what the user gave: which key, its value, what it should be."""

    key: str
    got: Any
    expected: str

    def __str__(self) -> str:
        return f"{self.key}: got {self.got!r}; expected {self.expected}"


class ConfigError(ValueError):
    """Something the user gave is wrong; the message has one line a fault.

    Args:
        faults: faults, or lines that say what was wrong, what was expected, how to repair it.
    """

    def __init__(self, *faults: Fault | str) -> None:
        super().__init__("\n".join(dict.fromkeys(map(str, faults))))
        self.faults = faults


class FatalError(Exception):
    """The job cannot go on: any other item would meet the same, as a disk that is full or a model that is not there.

    The message is one line; ``remedy`` is what follows it, empty where the message says it by itself.
    """

    remedy = "what is committed stays, rerun goes on"


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come: to be ended as by Ctrl-C, by all that cleans up after itself."""


FULL_OR_GONE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN}
"""Errors of a disk that is full or out of reach: no fault of the code, so a line and no traceback."""


NO_SUCH_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY, errno.EEXIST, errno.ETXTBSY, None),
}
"""Errors of a path that is not what was expected, or not allowed; None is pyarrow's, which tells only a text."""


class DamagedError(ConfigError):
    """A file is not what it was written as; one line: the file, what is wrong with it, how to repair it."""


class StorageError(OSError):
    """Object storage refuses or does not answer; the message is one line: the path, the HTTP status, the reason."""


def one_line(error: Exception) -> str:
    """An error of ``requests`` in one line, without the names of its inner objects where it has a cause."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return " ".join(str(reason or error).split()) or type(error).__name__
