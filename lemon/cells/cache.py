"""Images of a selection on a local disk, uncompressed: a cache that all selections, runs and processes of a node share.

A file holds the first cells of one shard, as many as any selection asked for so far, and is named by the digest of the
shard's rows and, where it holds fields in place of the shard's images, by their width. So a larger selection of the
same slides adds to the files of a smaller one. Cells are appended, each with a checksum over its image and its place,
which is compared whenever it is read: what was cut short or damaged is told and made anew. A file is written by the
process that holds its lock.

Who reads holds a claim: a locked file that names the files it needs. Locks end with their process, so a claim that can
be locked is what a killed process left. Before files are made, others that nobody claims make room, the least recently
used first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np

from lemon.cells.images import THREADS, part_images, places_of
from lemon.cells.select import Part, Selection
from lemon.errors import ConfigError, StorageError
from lemon.runtime.limits import allow_open_files
from lemon.schema import CELL_BYTES

logger = logging.getLogger(__name__)

RECORD_BYTES = CELL_BYTES + 8
"""An image and its checksum."""

FOLDER, IMAGES, CLAIM = "cells", ".images", ".claim"
_EARLIER = re.compile(r"cells-[0-9a-f]{16}(\.[0-9a-f]{8})?\.(u8|tmp)")
"""Files of earlier versions, one a selection."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_WEIGHTS = np.random.SeedSequence(60).generate_state(CELL_BYTES // 8, np.uint64) | np.uint64(1)


def bytes_in_cache(selection: Selection) -> int:
    """What the images of a selection take in the cache."""
    return selection.n_cells * RECORD_BYTES


def check_cache(selection: Selection, *, cache: str | Path, cache_gb: float) -> None:
    """Raise what opening ``CachedImages`` would for the folder and its room; makes and removes nothing."""
    _Folder(cache).files_in_the_way(_sizes(selection), cache_gb=cache_gb)


def checksums(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A checksum of each image at its place: uint64 [N]. Some four times as fast as CRC-32 (``benchmarks.feed``).

    A sum of 64-bit words times odd constants, modulo 2**64, and of the row: a change of one word always changes it,
    any other change but once in 2**64 (multilinear hashing; Carter and Wegman 1979).

    Args:
        images: uint8 [N, 10800], contiguous.
        rows: int [N].
    """
    return images.view("<u8") @ _WEIGHTS + rows.astype(np.uint64) + np.uint64(1)


class CachedImages:
    """The images of a selection, read one by one from the cache, which is filled where it lacks them.

    Several processes fill it together, each shard once. Nobody removes its files before ``close``.

    Args:
        selection: of cells.
        cache: folder on a local disk.
        cache_gb: GB that the cache may take in all.

    Raises:
        StorageError: the disk has no room, or the folder no locks.
        ConfigError: the folder cannot be written, or a shard is damaged or another than its table says.
    """

    def __init__(self, selection: Selection, *, cache: str | Path, cache_gb: float) -> None:
        self._selection = selection
        folder = _Folder(cache)
        self._paths = [folder.path / _name(part) for part in selection.parts]
        claim = folder.claim(_sizes(selection), cache_gb=cache_gb)
        self._files: dict[int, int] = {}
        self._max_files = allow_open_files(len(selection.parts))
        self._opening = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, "lemon-cache")
        self.close: Callable[[], object] = weakref.finalize(self, _close, self._pool, self._files, claim)
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def prepare(self, numbers: np.ndarray) -> None:
        """Nothing: every image is read alike."""

    def forget(self) -> None:
        """Nothing."""

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill uint8 [N, 60, 60, 3], contiguous, with the images of cells (int64 [N]). For one thread.

        Raises StorageError where what is read is not what was written, also when it was written again.
        """
        parts, rows = places_of(self._selection, numbers)
        images = out.reshape(len(out), CELL_BYTES)
        edges = np.linspace(0, len(numbers), THREADS + 1).astype(int).tolist()
        shares = [slice(*pair) for pair in pairwise(edges)]
        reads = self._pool.map(lambda share: self._read(parts[share], rows[share], images[share]), shares)
        wrong = np.concatenate(list(reads))
        for part in np.unique(parts[wrong]).tolist():
            self._mend(part, np.flatnonzero(wrong & (parts == part)), parts, rows, images)

    def _read(self, parts: np.ndarray, rows: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Fill uint8 [N, 10800]; returns which of them are not what was written: bool [N]."""
        stated = np.zeros(len(parts), "<u8")
        stated_bytes = stated.view(np.uint8).reshape(-1, 8)
        for index, (part, row) in enumerate(zip(parts.tolist(), rows.tolist(), strict=True)):
            file = self._files.get(part)
            if file is None and (file := self._open(part)) is None:
                continue
            os.preadv(file, [images[index], stated_bytes[index]], row * RECORD_BYTES)
            if part not in self._files:
                os.close(file)
        return checksums(images, rows) != stated

    def _open(self, part: int) -> int | None:
        """A part's file, kept open as far as the system allows; None where somebody removed it."""
        with self._opening:
            if part in self._files:
                return self._files[part]
            try:
                file = os.open(self._paths[part], os.O_RDONLY)
            except FileNotFoundError:
                return None
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead of what comes in no order
            if len(self._files) < self._max_files:
                self._files[part] = file
            return file

    def _mend(self, part: int, at: np.ndarray, parts: np.ndarray, rows: np.ndarray, images: np.ndarray) -> None:
        """Make a part's file anew, in place, and fill the images ``at`` which it did not have as they were written."""
        logger.warning(f"cache: {self._paths[part]} is damaged, cut short or gone; it is made anew")
        self._extend(part, anew=True)
        if part in self._files:  # of a file that may have been removed
            os.close(self._files.pop(part))
        read = np.empty((len(at), CELL_BYTES), np.uint8)
        if self._read(parts[at], rows[at], read).any():
            raise StorageError(f"cache: {self._paths[part]} reads otherwise than it was written; check the disk")
        images[at] = read

    def _fill(self) -> None:
        """Extend the files that are too short: first those that no other process is at, then, waiting, the others."""
        left = list(range(len(self._paths)))
        shift = random.randrange(len(left))  # so that processes which begin together do not meet at every file
        left = left[shift:] + left[:shift]
        for wait in (False, True):
            if left and wait:
                logger.info(f"cache: another process fills {len(left):,} files of {self._paths[0].parent}; waiting")
            done = list(self._pool.map(lambda part, wait=wait: self._extend(part, wait=wait), left))
            left = [part for part, is_done in zip(left, done, strict=True) if not is_done]

    def _extend(self, part: int, *, wait: bool = True, anew: bool = False) -> bool:
        """Add to a file what it lacks of its part; False where another process is at it."""
        with _locked(self._paths[part], wait=wait) as file:
            if file is None:
                return False
            done = 0 if anew else os.fstat(file).st_size // RECORD_BYTES
            if done < self._selection.parts[part].n_rows:
                self._append(file, part, done)
        return True

    def _append(self, file: int, part: int, done: int) -> None:
        """Write a part's cells from row ``done`` on; nothing of them stays where that fails."""
        row = done
        try:
            for images in part_images(self._selection, self._selection.parts[part], first=done):
                _write(file, _records(images, first=row), row * RECORD_BYTES)
                row += len(images)
            _note_use(file)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(file, done * RECORD_BYTES)
            if isinstance(error, OSError) and error.errno in _FULL:
                folder = self._paths[part].parent
                raise StorageError(_no_room(folder, needed=bytes_in_cache(self._selection), why=error)) from None
            raise


def _close(pool: ThreadPoolExecutor, files: dict[int, int], claim: tuple[int, Path]) -> None:
    pool.shutdown(cancel_futures=True)
    while files:
        os.close(files.popitem()[1])
    file, path = claim
    path.unlink(missing_ok=True)
    os.close(file)


def _sizes(selection: Selection) -> dict[str, int]:
    """Bytes of the files that a selection needs, by their names."""
    return {_name(part): part.n_rows * RECORD_BYTES for part in selection.parts}


def _name(part: Part) -> str:
    if part.images_digest is None:
        raise ConfigError(f"cells: the table states no digest of {part.name}; curate the slide again")
    return hashlib.sha256(part.images_digest.encode()).hexdigest()[:32] + IMAGES


def _records(images: np.ndarray, *, first: int) -> memoryview:
    """Images uint8 [N, 60, 60, 3] from a row on, each with its checksum, as they are in a file."""
    records = np.empty((len(images), RECORD_BYTES), np.uint8)
    flat = np.ascontiguousarray(images).reshape(len(images), CELL_BYTES)
    records[:, :CELL_BYTES] = flat
    sums = checksums(flat, np.arange(first, first + len(images)))
    records[:, CELL_BYTES:] = sums.astype("<u8").view(np.uint8).reshape(-1, 8)
    return records.data.cast("B")


def _write(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _note_use(file: int | Path) -> None:
    """By which the least recently used are found; the time of a write alone has steps of milliseconds."""
    now_ns = time.time_ns()
    os.utime(file, ns=(now_ns, now_ns))


# --- the folder -------------------------------------------------------------------------------------------------------


class _Folder:
    """The cache's files: which there are, who needs them, and which may go."""

    def __init__(self, cache: str | Path) -> None:
        self.path = Path(cache).expanduser().absolute() / FOLDER

    def claim(self, sizes: Mapping[str, int], *, cache_gb: float) -> tuple[int, Path]:
        """Make room for files of some sizes and keep them from being removed, until the claim is unlocked: its file,
        open and locked, and its path."""
        with _locked(self.path / "lock", wait=True):
            for path in self.files_in_the_way(sizes, cache_gb=cache_gb):
                path.unlink(missing_ok=True)
            for name in sizes:
                with contextlib.suppress(FileNotFoundError):
                    _note_use(self.path / name)
            path = self.path / f"{uuid.uuid4().hex}{CLAIM}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            _lock(file, path, wait=True)  # who checks may hold it for a moment
            try:
                _write(file, memoryview(json.dumps(sizes).encode()), 0)
            except OSError as error:
                path.unlink()
                os.close(file)
                raise StorageError(_no_room(self.path, needed=sum(sizes.values()), why=error)) from None
            return file, path

    def files_in_the_way(self, sizes: Mapping[str, int], *, cache_gb: float) -> list[Path]:
        """What has to be removed for files of some sizes: of those that nobody needs, the least recently used.

        Raises ConfigError for a folder that cannot be written, StorageError where no room can be made.
        """
        place = next(folder for folder in (self.path, *self.path.parents) if os.path.lexists(folder))
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"cache: cannot write to {place}; expected a folder on a local disk: cache=...")
        claims, abandoned = self._claims()
        needed = {name: max(claim.get(name, 0) for claim in (sizes, *claims)) for name in set().union(sizes, *claims)}
        present = {path: path.stat() for path in self._files()}
        there = {path.name: status.st_size for path, status in present.items()}
        idle = sorted((path for path in present if path.name not in needed), key=lambda path: present[path].st_mtime_ns)
        in_use = sum(max(size, there.get(name, 0)) for name, size in needed.items())
        growth = sum(max(0, size - there.get(name, 0)) for name, size in needed.items())
        idle_bytes, free = sum(present[path].st_size for path in idle), shutil.disk_usage(place).free
        if in_use > cache_gb * 1e9:
            others = in_use - sum(sizes.values())
            raise StorageError(
                f"cache: {place}: {sum(sizes.values()) / 1e9:.3f} GB are needed, and other runs use {others / 1e9:.3f} "
                f"of cache_gb={cache_gb:g}; wait for them, or raise cache_gb"
            )
        if growth > free + idle_bytes:
            raise StorageError(_no_room(place, needed=growth, free=free + idle_bytes))
        surplus = max(in_use + idle_bytes - cache_gb * 1e9, growth - free)
        gone = list(abandoned)
        for path in idle:
            if surplus > 0 or not present[path].st_size:  # empty: a killed process made it and wrote nothing
                gone.append(path)
                surplus -= present[path].st_size
        return gone

    def _files(self) -> list[Path]:
        """Images, and what earlier versions left beside the folder."""
        own = [path for path in _entries(self.path) if path.suffix == IMAGES]
        earlier = [path for path in _entries(self.path.parent) if _EARLIER.fullmatch(path.name)]
        return [path for path in (*own, *earlier) if path.is_file() and not path.is_symlink()]

    def _claims(self) -> tuple[list[dict[str, int]], list[Path]]:
        """The sizes that running processes claim, and claims that killed ones left."""
        claims, abandoned = [], []
        for path in _entries(self.path):
            if path.suffix == CLAIM:
                with contextlib.suppress(FileNotFoundError, ValueError), path.open("rb") as stream:
                    if _lock(stream.fileno(), path, wait=False):
                        abandoned.append(path)
                    else:
                        claims.append(json.loads(stream.read()))
        return claims, abandoned


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _no_room(place: Path, *, needed: int, free: int | None = None, why: OSError | None = None) -> str:
    free = shutil.disk_usage(place).free if free is None else free
    reason = "" if why is None else f" ({os.strerror(why.errno or errno.ENOSPC)})"
    return (
        f"cache: {place}: images of {needed / 1e9:.3f} GB are to be written, and {free / 1e9:.3f} GB are free there; "
        f"free some, put them elsewhere with cache=..., or stream from the table with cache_gb=0{reason}"
    )


# --- one process writes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[int | None]:
    """A file, made where there is none, open and locked; None where another process holds it, unless ``wait``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"cache: cannot write {path}: {error.strerror}; give another folder: cache=...") from None
    try:
        if not _lock(file, path, wait=wait):
            yield None
        elif _is_named(file, path):
            yield file
        else:  # it was removed between the two
            with _locked(path, wait=wait) as other:
                yield other
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
    """Whether an open file still is the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
