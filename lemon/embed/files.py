"""Files that a library writes by their path, made to appear in a store whole or not at all."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from lemon.runtime.store import TEMPORARY, Store


@contextlib.contextmanager
def whole(store: Store, name: str) -> Iterator[Path]:
    """A local path to write a file or (in a local store) a folder to; it is ``name`` when the block ends well.

    Raises OSError when it cannot be written.
    """
    if not store.is_local:
        with tempfile.TemporaryDirectory(prefix="lemon-embed-") as scratch:
            path = Path(scratch) / Path(name).name
            yield path
            with path.open("rb") as source, store.write(name) as target:
                shutil.copyfileobj(source, target, 8 << 20)
        return
    final = Path(store.path(name))
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f"{TEMPORARY}*-{final.name}"):  # of a writer that was killed
        _remove(left)
    temporary = final.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}")
    try:
        yield temporary
        _remove(final)
        temporary.rename(final)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
