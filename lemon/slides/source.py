"""What a slide's file is: a digest of its bytes, and the size and time by which a rerun sees that it is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from lemon.runtime.store import READERS, Store, is_uri, locate
from lemon.schema import SlideRow
from lemon.slides.headers import read_instance
from lemon.slides.paths import on_disk

HEADS = {".mrxs", ".vms", ".vmu"}
"""Formats whose file names others, in its folder, that hold the pixels."""


@dataclass(frozen=True)
class Source:
    """A slide's file or files as they were read.

    The digest is of all bytes (SHA-256, 32 digits), as a changed pixel may leave size, ends and OpenSlide's quickhash
    as they were. It costs one pass over a file that is being read anyway (about 1.5 GB/s on one core).
    """

    size_bytes: int
    mtime_ns: int
    digest: str


def files_of(path: Path) -> list[Path]:
    """The files of a local slide: itself, and for some formats those in the folder of its name or beside it.

    Raises OSError for one that is no regular file: a pipe would be waited for.
    """
    path = Path(on_disk(str(path)))
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: no regular file")
    if instance := read_instance(str(path)):
        return [file for file in sorted(path.parent.iterdir()) if _is_of(instance.series, file)]
    if path.suffix.lower() not in HEADS:
        return [path]
    beside = path.parent.glob(f"{path.stem}*") if path.suffix.lower() != ".mrxs" else path.with_suffix("").rglob("*")
    return [path, *sorted(file for file in beside if file.is_file() and file != path)]


def _is_of(series: str, file: Path) -> bool:
    other = read_instance(str(file)) if file.is_file() else None
    return other is not None and other.series == series


def digest_of(path: Path) -> str:
    """The digest of a local slide. Raises OSError."""
    parts = []
    for file in files_of(path):
        with file.open("rb") as stream:
            parts.append(hashlib.file_digest(stream, "sha256"))
    digest = parts[0] if len(parts) == 1 else hashlib.sha256(b"".join(part.digest() for part in parts))
    return digest.hexdigest()[:32]


def size_and_time(path: str) -> tuple[int, int] | None:
    """Bytes and time (ns) of a slide's file, local or at s3://; None where it is not there."""
    if is_uri(path) and not path.startswith("s3://"):
        return None  # a download that is gone
    if is_uri(path):
        store, name = locate(path)
        info = store.info(name)
        return None if info.type == pafs.FileType.NotFound else (int(info.size or 0), int(info.mtime_ns or 0))
    try:
        stats = [file.stat() for file in files_of(Path(path))]
    except OSError:
        return None
    # A file that was put there with the time of another (cp -p, rsync -t) shows it in the time of its inode.
    return sum(stat.st_size for stat in stats), max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def changed_sources(rows: Iterable[SlideRow], paths: dict[str, str]) -> set[str]:
    """Slides whose files differ from those that rows of the slides table were made of.

    A file of the same size and time is taken as the same; of a local one that differs in them the digest decides, as a
    copy has another time. A file that is gone has not changed.

    Args:
        rows: of the slides table.
        paths: where each slide's file is now, by slide id.
    """

    def is_changed(row: SlideRow) -> bool:
        path = paths[row.slide_id]
        now = size_and_time(path)
        if now is None or row.source_digest is None or now == (row.source_size_bytes, row.source_mtime_ns):
            return False
        if now[0] != row.source_size_bytes or is_uri(path):
            return True
        return digest_of(Path(path)) != row.source_digest

    known = [row for row in rows if row.slide_id in paths]
    with ThreadPoolExecutor(READERS) as pool:
        return {row.slide_id for row, changed in zip(known, pool.map(is_changed, known), strict=True) if changed}


def mask_digest(folder: str | None, stem: str) -> str | None:
    """The digest of a slide's tissue mask, ``<folder>/<stem>.png``, local or at s3://; None where there is none."""
    if folder is None:
        return None
    try:
        return hashlib.sha256(Store(folder).read_bytes(f"{stem}.png")).hexdigest()[:32]
    except OSError:
        return None


def changed_masks(rows: Iterable[SlideRow], folder: str | None, *, stem: Callable[[str], str]) -> set[str]:
    """Slides whose masks in ``folder`` are other ones than those that rows of the slides table were made with."""
    known = [row for row in rows if folder is not None]
    with ThreadPoolExecutor(READERS) as pool:
        now = pool.map(lambda row: mask_digest(folder, stem(row.slide_id)), known)
        return {row.slide_id for row, digest in zip(known, now, strict=True) if digest != row.mask_digest}


def read_source(path: str, *, local: Path) -> Source | None:
    """The source of a slide that is at ``path`` and, for the length of a job, at ``local``; None where it is gone."""
    known = size_and_time(path)
    if known is None:
        return None
    try:
        return Source(*known, digest_of(local))
    except OSError:
        return None
