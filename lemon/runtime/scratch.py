"""Folders for files of the moment, on a local disk. What a killed process left there goes with the next one that comes.

A folder is locked by its process. The lock ends with the process, however it ends, so what is left behind is told from
what is in use, also between containers that share a disk. Besides, a folder is only taken for LEMON's by the empty file
``MARK`` in it, and only its owner removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "lemon-scratch-"
MARK = ".lemon-scratch"


@contextlib.contextmanager
def scratch_folder(parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """A folder of this process alone, removed when the block ends.

    Args:
        parent: a local folder, made where it is not there; None: the system's for temporary files.

    Raises OSError.
    """
    above = Path(parent or tempfile.gettempdir()).expanduser()
    above.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(above)
    folder, lock = _locked(above)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked(above: Path) -> tuple[Path, int]:
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=above))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / MARK).touch()  # only with the lock: without it nobody removes the folder
    return folder, lock


def _remove_abandoned(above: Path) -> None:
    for left in above.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone by now, another user's, or locked by the process that works in it
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if (left / MARK).is_file() and os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(left)
            finally:
                os.close(lock)
