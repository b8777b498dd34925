"""Slides at s3://: OpenSlide reads local files only, so a slide is fetched for as long as it is worked on."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lemon.runtime.scratch import scratch_folder
from lemon.runtime.store import is_uri, locate
from lemon.slides.errors import SlideError
from lemon.slides.paths import on_disk
from lemon.slides.source import HEADS

SEVERAL_FILES = (*HEADS, ".dcm")
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
            copy = stack.enter_context(scratch_folder(folder)) / f"slide{suffix}"
            store, name = locate(path)
            size, free = store.size(name), shutil.disk_usage(folder).free
            if free < size + SPARE_BYTES:
                raise SlideError(f"no space to fetch it: {size / 1e9:.1f} GB, {free / 1e9:.1f} GB free in {folder}")
            store.download(name, copy)
        except FileNotFoundError:
            raise SlideError("file not found") from None
        except (OSError, ValueError) as error:
            raise SlideError(f"cannot be fetched: {error}") from None
        yield str(copy)
