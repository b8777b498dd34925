"""Where tables live: a folder or an s3:// prefix behind one small interface, with atomic writes and fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lemon.version import __version__

BATCH_ROWS = 2048
"""Rows that a reader holds at most: of cells, 22 MB of crops."""

CIRCUMSTANCES = b"lemon.circumstances"
"""Key in a Parquet file's metadata: a fingerprint of all that the file was made from."""

TEMPORARY = ".tmp-"
"""Marks a file that is being written; readers and listings pass over it."""


class Store:
    """A folder of files, local or on object storage.

    Names are relative, with forward slashes. ``write`` is atomic on both: a reader sees the whole file or none.
    Raises ValueError for a URI whose scheme is not known.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = str(uri)
        if "://" in uri and not uri.startswith("file://"):
            try:
                self.filesystem, self.root = pafs.FileSystem.from_uri(uri.rstrip("/"))
            except pa.ArrowInvalid as error:
                raise ValueError(f"{uri}: expected a local path or s3://bucket/prefix ({error})") from None
            self.uri, self.is_local = uri.rstrip("/"), False
        else:
            self.root = str(Path(uri.removeprefix("file://")).absolute())
            self.filesystem, self.uri, self.is_local = pafs.LocalFileSystem(), self.root, True

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def path(self, name: str) -> str:
        """The path of ``name`` as ``self.filesystem`` spells it."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether a file (or folder) of that name is there."""
        return self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def list(self, folder: str, *, suffix: str = "") -> list[str]:
        """Names of the files below ``folder`` that end in ``suffix``, sorted; an absent folder is empty."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        found = (info.path for info in self.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
        names = (path[len(self.root) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(suffix) and TEMPORARY not in name)

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all below it; absent is fine."""
        kind = self.filesystem.get_file_info(self.path(name)).type
        if kind == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.path(name))
        elif kind == pafs.FileType.File:
            self.filesystem.delete_file(self.path(name))

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream whose content appears under ``name`` when the block ends well, and never otherwise."""
        if self.is_local:
            with _write_local(Path(self.path(name))) as stream:
                yield stream
            return
        # An object appears when its upload completes, and closing a stream completes it, also after an error:
        # so the content is made whole on local disk first.
        with tempfile.TemporaryFile() as spool:
            yield spool
            spool.seek(0)
            with self.filesystem.open_output_stream(self.path(name)) as target:
                while block := spool.read(8 << 20):
                    target.write(block)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        with self.write(name) as stream:
            stream.write(content)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file atomically."""
        self.write_bytes(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write one Parquet file atomically."""
        with self.write(name) as stream:
            pq.write_table(table, stream, **options)

    def read_bytes(self, name: str) -> bytes:
        """The whole of a file. Raises FileNotFoundError."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return bytes(stream.read())

    def read_json(self, name: str) -> Any:
        """A JSON file's value. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str, **options: Any) -> pa.Table:
        """One Parquet file. Raises FileNotFoundError."""
        return pq.read_table(self.path(name), filesystem=self.filesystem, **options)

    @contextlib.contextmanager
    def open_parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read piece by piece. Raises FileNotFoundError."""
        with self.filesystem.open_input_file(self.path(name)) as source:
            yield pq.ParquetFile(source)

    def circumstances(self, name: str) -> str | None:
        """What a Parquet file says that it was made from; None where it is absent or does not say."""
        if not self.exists(name):
            return None
        with self.open_parquet(name) as file:
            found = (file.schema_arrow.metadata or {}).get(CIRCUMSTANCES)
        return None if found is None else found.decode()

    def iter_batches(self, name: str, *, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """One Parquet file, ``BATCH_ROWS`` rows or fewer at a time, in order. Raises FileNotFoundError."""
        with self.open_parquet(name) as file:
            # Row group by row group: over several, pyarrow keeps what it has read (measured: 655 MB of a 666 MB file).
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[*columns])

    def remove_temporaries(self, folder: str, stem: str) -> None:
        """Remove what writers of ``<folder>/<stem>*`` that were killed left behind (local only: S3 leaves nothing)."""
        if self.is_local:
            for left in Path(self.path(folder)).glob(f"{TEMPORARY}*"):
                if left.name.split("-", 2)[2].startswith(stem):
                    left.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raise OSError unless a file can be made here."""
        probe = f"{TEMPORARY}probe-{uuid.uuid4().hex}"
        self.write_bytes(probe, b"lemon")
        self.delete(probe)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local folder for libraries that take no other: of a folder at s3:// a copy, while the block lasts."""
    store = Store(path)
    if store.is_local:
        yield Path(store.root)
        return
    with tempfile.TemporaryDirectory(prefix="lemon-copy-") as copy:
        pafs.copy_files(store.root, copy, source_filesystem=store.filesystem)
        yield Path(copy)


@contextlib.contextmanager
def _write_local(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that name a JSON-able value: equal values, equal digits, whatever the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def file_fingerprint(path: str | os.PathLike[str]) -> str:
    """16 hexadecimal digits of a file's content."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


@cache
def code_version() -> str:
    """The package's version, with the git commit (and ``+`` for uncommitted changes) where it runs from a checkout."""
    here = Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return __version__
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{described}"
