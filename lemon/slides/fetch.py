"""Slides at s3://: OpenSlide reads local files only, so a slide is fetched for as long as it is worked on.

A fetched file is locked by its process. The lock ends with the process, however it ends, so what a killed one left
behind is told from what another one works on, also between containers that share a scratch folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lemon.runtime.store import is_uri, locate
from lemon.slides.errors import SlideError
from lemon.slides.paths import on_disk

PREFIX = "lemon-slide-"
SEVERAL_FILES = (".mrxs", ".vms", ".vmu", ".dcm")
SPARE_BYTES = 1 << 30  # left free on the scratch disk: shards are spilled and spooled there too


@contextlib.contextmanager
def local_slide(path: str, *, scratch: str | None = None) -> Iterator[str]:
    """A local path of a slide: itself, or of one at s3:// a copy in ``scratch`` that is deleted when the block ends.

    Args:
        path: local or s3://.
        scratch: a folder on a local disk; None: the system's for temporary files.

    Raises SlideError when it cannot be fetched: absent, no space, no answer, a format of several files.
    """
    if not is_uri(path):
        yield on_disk(path)
        return
    suffix = Path(path).suffix.lower()
    if suffix in SEVERAL_FILES:
        raise SlideError(f"a {suffix} slide is several files, which are not fetched from s3://; copy it to a disk")
    folder = Path(scratch or tempfile.gettempdir()).expanduser()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            store, name = locate(path)
            size, free = store.size(name), shutil.disk_usage(folder).free
            if free < size + SPARE_BYTES:
                raise SlideError(f"no space to fetch it: {size / 1e9:.1f} GB, {free / 1e9:.1f} GB free in {folder}")
            copy = stack.enter_context(_locked(folder, suffix))
            store.download(name, copy)
        except FileNotFoundError:
            raise SlideError("file not found") from None
        except (OSError, ValueError) as error:
            raise SlideError(f"cannot be fetched: {error}") from None
        yield copy


@contextlib.contextmanager
def _locked(folder: Path, suffix: str) -> Iterator[str]:
    """A file of our own, which no other process takes for abandoned; it is gone when the block ends."""
    while True:
        with tempfile.NamedTemporaryFile(prefix=PREFIX, suffix=suffix, dir=folder, delete=False) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if Path(file.name).exists():  # else another process came before the lock
                try:
                    yield file.name
                finally:
                    Path(file.name).unlink(missing_ok=True)
                return


def _remove_abandoned(folder: Path) -> None:
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where a process works on it
            left.unlink()
