"""The images of a selection, uncompressed: in memory, or in a file of a cache that all processes of a node share.

A file ``cells-<fingerprint>.u8`` holds the images, then a CRC-32 of each slide's part and one of these. It is filled
under the name ``cells-<fingerprint>.tmp`` by the process that holds that file's lock; others wait for it. A lock ends
with its process, so a temporary file that can be locked is what a killed fill left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lemon.cells.select import Selection
from lemon.cells.shard import images_from_arrow
from lemon.errors import ConfigError, StorageError
from lemon.runtime.shards import ShardError
from lemon.schema import CELL_PX

logger = logging.getLogger(__name__)

IMAGE_BYTES = CELL_PX * CELL_PX * 3
THREADS = 8
_READ_BYTES = 16 << 20
_PARTIAL_NAME = re.compile(r"cells-[0-9a-f]{16}(\.[0-9a-f]{8})?\.tmp")  # with a second part: of earlier versions
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}

Put = Callable[[int, int, np.ndarray], None]
"""Takes the number of a part, the place of its next image among all, and images uint8 [n, 60, 60, 3]."""


def read_images(selection: Selection) -> np.ndarray:
    """The images of a selection in memory, uint8 [N, 60, 60, 3]. Order: by slide, by rank within."""
    images = np.empty((selection.n_cells, CELL_PX, CELL_PX, 3), np.uint8)

    def put(_part: int, place: int, block: np.ndarray) -> None:
        images[place : place + len(block)] = block

    _copy(selection, put)
    return images


def open_images(selection: Selection, *, cache: str | Path) -> np.ndarray:
    """The images of a selection, uint8 [N, 60, 60, 3], as a memory map of an uncompressed file in ``cache``.

    The file is made once and shared by all processes of a node: random access into Parquet would read a row group for
    every cell. Each opening reads the file once and holds it against its checksums, which costs what the disk takes to
    read it (1 to 3 GB/s a core when it is in memory) and leaves it in memory for training; a file that is damaged or
    cut short is made anew.

    Raises:
        StorageError: the disk has no room for the file, or the folder no locks.
        ConfigError: the folder cannot be written, or a shard is damaged or another than its table says.
    """
    path, shape = _path(selection, cache), (selection.n_cells, CELL_PX, CELL_PX, 3)
    _reclaim(path.parent)
    check_cache(selection, cache=cache)
    while not _is_whole(path, selection):
        with _locked(path.with_suffix(".tmp")) as file:
            if file is not None:
                _build_cache(file, path, selection)
                break
    return np.memmap(path, np.uint8, "r", shape=shape)


def check_cache(selection: Selection, *, cache: str | Path) -> None:
    """Raise ConfigError for a folder that cannot be written, StorageError where the file would not fit; makes nothing.

    A file that is there already needs no room.
    """
    path = _path(selection, cache)
    place = next(folder for folder in (path.parent, *path.parent.parents) if os.path.lexists(folder))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"cache: cannot write to {place}; expected a folder on a local disk: cache=...")
    if path.exists():
        return
    needed, free = _size(selection), shutil.disk_usage(place).free
    free += sum(left.stat().st_blocks * 512 for left in _partial(path.parent))  # reserved by now, or left
    if free < needed:
        raise StorageError(_no_space_message(selection, place, free=free))


def _path(selection: Selection, cache: str | Path) -> Path:
    return Path(cache).expanduser().absolute() / f"cells-{selection.fingerprint}.u8"


def _size(selection: Selection) -> int:
    return selection.n_cells * IMAGE_BYTES + 4 * (len(selection.parts) + 1)


def _no_space_message(selection: Selection, place: Path, *, free: int) -> str:
    return (
        f"cache: {place}: the images of {selection.n_cells:,} cells take {_size(selection) / 1e9:.3f} GB, and "
        f"{free / 1e9:.3f} GB are free there; free some, choose fewer cells, or put them elsewhere with cache=..."
    )


def _starts(selection: Selection) -> np.ndarray:
    """Where each part begins among all images, and where the last ends: int64 [P + 1]."""
    return np.cumsum([0, *(part.n_rows for part in selection.parts)])


def _copy(selection: Selection, put: Put) -> None:
    """Read the images of all parts, several parts at a time, each in its order."""
    starts = _starts(selection)

    def copy(index: int) -> None:
        part, place = selection.parts[index], int(starts[index])
        try:
            for batch in selection.batches(part, ["image"]):
                put(index, place, images_from_arrow(batch["image"]))
                place += len(batch)
        except ShardError as error:
            raise ConfigError(f"cells: {selection.store.uri}/{error}; curate the slide again") from None

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, range(len(selection.parts))))


# --- the file ---------------------------------------------------------------------------------------------------------


def _build_cache(file: int, path: Path, selection: Selection) -> None:
    """Fill the locked temporary file and give it its name; nothing of it stays where that fails."""
    temporary = path.with_suffix(".tmp")
    try:
        if path.exists():
            logger.warning(f"cache: {path} is damaged, cut short or of an earlier version; it is made anew")
            path.unlink()  # first, as it takes room
        _reserve(file, _size(selection))
        _fill(file, selection)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        os.ftruncate(file, 0)  # frees what it took, before the error is raised
        message = _no_space_message(selection, path.parent, free=shutil.disk_usage(path.parent).free)
        raise StorageError(f"{message} ({os.strerror(error.errno)})") from None


def _fill(file: int, selection: Selection) -> None:
    sums = np.zeros(len(selection.parts) + 1, "<u4")

    def put(part: int, place: int, images: np.ndarray) -> None:
        content = np.ascontiguousarray(images).data.cast("B")
        sums[part] = zlib.crc32(content, int(sums[part]))
        _write(file, content, place * IMAGE_BYTES)

    _copy(selection, put)
    sums[-1] = zlib.crc32(sums[:-1].data)
    _write(file, sums.data.cast("B"), selection.n_cells * IMAGE_BYTES)
    os.fsync(file)


def _reserve(file: int, size: int) -> None:
    """Take the room first. Through a map, or in a sparse file, a full disk is a SIGBUS and no error."""
    os.ftruncate(file, 0)
    if not hasattr(os, "posix_fallocate"):  # as on macOS; plain writes then raise
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot; plain writes then raise
            raise


def _write(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _is_whole(path: Path, selection: Selection) -> bool:
    """Whether a file has its size and its checksums."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as stream:
        file = stream.fileno()
        if os.fstat(file).st_size != _size(selection):
            return False
        starts = _starts(selection) * IMAGE_BYTES
        sums = np.frombuffer(os.pread(file, 4 * len(starts), int(starts[-1])), "<u4")
        if zlib.crc32(sums[:-1].data) != sums[-1]:
            return False

        def agrees(part: int) -> bool:
            return _crc(file, int(starts[part]), int(starts[part + 1])) == sums[part]

        with ThreadPoolExecutor(THREADS) as pool:
            return all(pool.map(agrees, range(len(selection.parts))))
    return False


def _crc(file: int, start: int, end: int) -> int:
    """CRC-32 of bytes ``start`` to ``end``."""
    checksum = 0
    while start < end and (content := os.pread(file, min(_READ_BYTES, end - start), start)):
        checksum, start = zlib.crc32(content, checksum), start + len(content)
    return checksum


# --- one process fills ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(temporary: Path) -> Iterator[int | None]:
    """The temporary file, open and locked; None where another process was at it, which may have made the file.

    Waits, with a line, while another process fills it.
    """
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"cache: cannot write {temporary}: {error.strerror}; give another folder: cache=..."
        ) from None
    try:
        if not _lock(file, temporary, wait=False):
            logger.warning(f"cache: another process makes {temporary.with_suffix('.u8')}; waiting for it")
            _lock(file, temporary, wait=True)
        yield file if _is_named(file, temporary) else None
    finally:
        os.close(file)


def _lock(file: int, path: Path, *, wait: bool) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StorageError(f"cache: {path.parent} has no file locks; put it on a local disk with cache=...") from None
    return True


def _is_named(file: int, path: Path) -> bool:
    """Whether an open file still is the one of that name, and was not renamed or removed by who held its lock."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _partial(folder: Path) -> list[Path]:
    """The temporary files of a folder, which may be absent: by names that only this file gives."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if _PARTIAL_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink()]


def _reclaim(folder: Path) -> None:
    """Remove what killed fills left: temporary files that nobody has locked."""
    for left in _partial(folder):
        with contextlib.suppress(FileNotFoundError, PermissionError):
            file = os.open(left, os.O_RDWR)
            try:
                if _lock(file, left, wait=False) and _is_named(file, left):
                    left.unlink()
            finally:
                os.close(file)
