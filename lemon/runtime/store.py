"""Where tables live: a folder or an s3:// prefix behind one small interface, with atomic writes and fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from lemon.errors import ConfigError, DamagedError, StorageError
from lemon.runtime import s3
from lemon.runtime.records import INTERNAL_FOLDER, FileRecord, Records, is_internal
from lemon.runtime.scratch import scratch_folder
from lemon.schema import fault_of, with_absent
from lemon.version import __version__

logger = logging.getLogger(__name__)

BATCH_ROWS = 2048
"""Rows that a reader holds at most: of cells, 22 MB of crops."""

CIRCUMSTANCES = "lemon.circumstances"
"""Key in a Parquet file's metadata: a fingerprint of all that the file was made from."""

PIECE_BYTES = 1 << 18
"""Of a column that is read as it is needed: what a request to object storage fetches at least."""

NOTICE_S = 10.0
"""Seconds without an answer after which a user is informed what a job waits for."""

READERS = 16
"""Requests under way at once."""

COPY_BYTES = 16 << 20
"""Bytes of a copy that are in memory; each is a request."""

TEMPORARY = ".lemon-tmp-"
"""Begins the name of a file that is being written; listings pass over it."""


class Store:
    """A folder of files, local or on object storage.

    Names are relative, with forward slashes, and never lead out of the folder. ``write`` is atomic on both: a reader
    sees the whole file or none. It and ``delete`` touch no file that LEMON did not write (lemon.runtime.records).
    On S3, endpoint, region and credentials come from where AWS's own tools have them: the environment, a profile, the
    machine's role. Raises ValueError for a URI that is not ``s3://bucket/prefix``, or that holds more than that.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = str(uri)
        if not uri.strip():
            raise ValueError("got an empty path; expected a folder or s3://bucket/prefix")
        self.is_local = not is_uri(uri)
        if self.is_local:
            self.root = str(Path(uri.removeprefix("file://")).expanduser().absolute())
            self.filesystem, self.uri = pafs.LocalFileSystem(), self.root
        else:
            self.root = s3.bucket_and_prefix(uri)
            self.filesystem, self.uri = s3.client(self.root.partition("/")[0], *s3.endpoint()), f"s3://{self.root}"
        self.records = Records(self)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)  # pyarrow's S3 filesystem would lose its retries on the way to a worker

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def path(self, name: str) -> str:
        """The path of ``name`` as ``self.filesystem`` spells it. Raises ValueError for a name that leads elsewhere."""
        if name.startswith("/") or not {".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(f"{name!r} leads out of {self.uri}")
        return f"{self.root}/{name}" if name else self.root

    def info(self, name: str) -> pafs.FileInfo:
        """Type, size and time of what is there; of type NotFound where nothing is."""
        with self._plain_errors(name):
            return self.filesystem.get_file_info(self.path(name))

    def exists(self, name: str) -> bool:
        """Whether a file (or folder) of that name is there. On S3 two requests: for many, ``list`` once."""
        return bool(self.info(name).type != pafs.FileType.NotFound)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        info = self.info(name)
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}/{name}: no such file")
        return int(info.size)

    def list(self, folder: str, *, suffix: str = "") -> list[str]:
        """Names of the files below ``folder`` that end in ``suffix``, sorted; an absent folder is empty.

        Files that are being written, and LEMON's own (``.lemon/``) unless they are asked for, are left out.
        """
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        with self._plain_errors(folder):
            infos = self.filesystem.get_file_info(selector)
        paths = (info.path for info in infos if info.type == pafs.FileType.File)
        names = (path[len(self.root) :].lstrip("/") for path in paths)
        hidden = () if is_internal(folder) else (INTERNAL_FOLDER,)
        return sorted(
            name
            for name in names
            if name.endswith(suffix)
            and not name.rpartition("/")[2].startswith(TEMPORARY)
            and not any(part in hidden for part in name.split("/"))
        )

    def entries(self, folder: str) -> set[str]:
        """Names of the files and folders right in a folder; an absent folder is empty."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        with self._plain_errors(folder):
            infos = self.filesystem.get_file_info(selector)
        return {info.path[len(self.root) :].strip("/") for info in infos} - {INTERNAL_FOLDER}

    def delete(self, name: str) -> None:
        """Remove a file that LEMON wrote, or all such files of a folder; absent is fine.

        Raises ForeignFileError for a single file that is not LEMON's; those of a folder stay where they are.
        """
        if self.info(name).type != pafs.FileType.Directory or self.records.of(name):
            self.records.require(name)
            self._remove(name)
            self.records.forget(name)
            return
        for each in self.list(name) if is_internal(name) else self.records.names(name):
            if self.records.agree(each):
                self._remove(each)
                self.records.forget(each)
        self.remove_empty(name)

    def _remove(self, name: str) -> None:
        with self._plain_errors(name), contextlib.suppress(FileNotFoundError):  # another process may be removing it
            if self.is_local and Path(self.path(name)).is_dir():
                shutil.rmtree(self.path(name))
            elif self.info(name).type == pafs.FileType.File:
                self.filesystem.delete_file(self.path(name))

    def remove_empty(self, folder: str) -> None:
        """Remove a local folder and those in it as far as nothing is left in them."""
        if self.is_local:
            for path, _, _ in os.walk(self.path(folder), topdown=False):
                with contextlib.suppress(OSError):
                    Path(path).rmdir()

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream whose content appears under ``name`` when the block ends well, and never otherwise.

        Raises ForeignFileError where a file of that name is not LEMON's.
        """
        with self.write_path(name) as path, path.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    @contextlib.contextmanager
    def write_path(self, name: str) -> Iterator[Path]:
        """A local path to write a file, or in a local store a folder, to, for libraries that take no stream.

        As ``write``: it becomes ``name`` when the block ends well.
        """
        replaced = self.records.require(name)
        with self._unnamed(name) as path:
            yield path
            self.records.note(name, FileRecord.of(path, local=self.is_local), replaced=replaced)
            self._give_name(path, name)

    @contextlib.contextmanager
    def _unnamed(self, name: str) -> Iterator[Path]:
        if not self.is_local:
            # An object appears when its upload completes, and closing a stream completes it, also after an error. So
            # the content is made whole on local disk first.
            with scratch_folder() as scratch:
                yield scratch / name.rpartition("/")[2]
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        path = final.with_name(f"{TEMPORARY}{uuid.uuid4().hex[:8]}-{final.name}")
        try:
            yield path
        finally:
            _discard(path)

    def _give_name(self, path: Path, name: str) -> None:
        if self.is_local:
            final = Path(self.path(name))
            if final.is_dir():
                shutil.rmtree(final)
            path.replace(final)
            return
        with path.open("rb") as source:
            self._upload(source, name)

    def _upload(self, source: IO[bytes], name: str) -> None:
        # Not pyarrow's copy_files: where the server refuses a small file, it reports success (pyarrow 25).
        def copy() -> None:
            with self.filesystem.open_output_stream(self.path(name)) as target:
                shutil.copyfileobj(source, target, COPY_BYTES)

        with self._plain_errors(name), ThreadPoolExecutor(1) as thread:  # a thread, which no signal interrupts
            thread.submit(copy).result()

    def download(self, name: str, target: str | os.PathLike[str]) -> None:
        """Copy a file, or a folder with all below it, to a local path. Raises FileNotFoundError."""
        with self._plain_errors(name):
            info = self.filesystem.get_file_info(self.path(name))
            if info.type == pafs.FileType.File:
                Path(target).parent.mkdir(parents=True, exist_ok=True)
                if info.size <= COPY_BYTES:
                    Path(target).write_bytes(self.read_bytes(name))
                    return
                with self.filesystem.open_input_file(self.path(name)) as source, Path(target).open("wb") as sink:
                    shutil.copyfileobj(source, sink, COPY_BYTES)
                return
        names = self.list(name)
        if not names:
            raise FileNotFoundError(f"{self.uri}/{name}: no such file or folder")

        def fetch(file_name: str) -> None:
            self.download(file_name, Path(target) / file_name[len(name) :].lstrip("/"))

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fetch, names))

    def write_internal(self, name: str, content: bytes) -> None:
        """Write a small file below ``.lemon/`` atomically; no record is kept of it."""
        assert is_internal(name)
        if not self.is_local:
            self._upload(io.BytesIO(content), name)
            return
        for attempt in range(3):
            try:
                with self._unnamed(name) as path:
                    path.write_bytes(content)
                    self._give_name(path, name)
                return
            except FileNotFoundError:  # another job, which ends, removed the empty folder
                if attempt == 2:
                    raise

    def remove_internal(self, name: str) -> None:
        """Remove a file below ``.lemon/``; absent is fine."""
        assert is_internal(name)
        self._remove(name)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a small file atomically."""
        with self.write(name) as stream:
            stream.write(content)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small JSON file atomically."""
        self.write_bytes(name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())

    def write_table(self, name: str, table: pa.Table, **options: Any) -> None:
        """Write one Parquet file atomically, with checksums of its pages."""
        with self.write(name) as stream:
            pq.write_table(table, stream, write_page_checksum=True, **options)

    @contextlib.contextmanager
    def open_binary(self, name: str) -> Iterator[pa.NativeFile]:
        """A file to read from start to end. Raises FileNotFoundError."""
        with self._plain_errors(name), self.filesystem.open_input_file(self.path(name)) as source:
            yield source

    def read_bytes(self, name: str) -> bytes:
        """The whole of a file. Raises FileNotFoundError."""
        for attempt in range(1, s3.MAX_ATTEMPTS + 1):
            try:
                # Not a stream: that asks S3 for 256 KB at a time.
                with self._plain_errors(name), self.filesystem.open_input_file(self.path(name)) as file:
                    return bytes(file.read(file.size()))
            except StorageError as error:
                if s3.NO_ROOM not in str(error) or attempt == s3.MAX_ATTEMPTS:
                    raise
                time.sleep(min(10.0, 0.2 * 2**attempt))
        raise AssertionError

    def read_json(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """A JSON file's value, as the type that pydantic makes of it.

        Raises FileNotFoundError; DamagedError where the file is cut short, is no JSON, or holds another kind of value.
        """
        return parse_json(self.read_bytes(name), kind, label=f"{self.uri}/{name}")

    def read_table(self, name: str, **options: Any) -> pa.Table:
        """One Parquet file. Raises FileNotFoundError."""
        with self._plain_errors(name):
            return pq.read_table(
                self.path(name), filesystem=self.filesystem, page_checksum_verification=True, **options
            )

    def read_tables(self, folder: str, *, schema: pa.Schema) -> pa.Table:
        """The small Parquet files of a folder as one table, in the order of their names.

        Each file is read whole, several at a time: what it takes are requests, not bytes. Raises ConfigError for a file
        that is damaged or is not of this table.
        """

        def read(name: str) -> pa.Table:
            try:
                source = pa.BufferReader(self.read_bytes(name))
                file = pq.ParquetFile(source, page_checksum_verification=True)
                fault = fault_of(file.schema_arrow, schema)
                if fault is None:
                    return file.read(use_threads=False)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, StorageError):
                    raise
                message = " ".join(str(error).split())
                fault = f"is damaged ({message}); delete it, and the job that wrote it makes it again"
            raise ConfigError(f"{self.uri}/{name} {fault}")

        with ThreadPoolExecutor(READERS) as pool:
            tables = list(pool.map(read, self.list(folder, suffix=".parquet")))
        return pa.concat_tables(
            [schema.empty_table(), *(with_absent(table, schema).select(schema.names).cast(schema) for table in tables)]
        )

    @contextlib.contextmanager
    def open_parquet(self, name: str, *, piecewise: bool = False) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read piece by piece. Raises FileNotFoundError.

        ``piecewise`` reads a column of a row group as it is needed, in place of all of it at once.
        """
        with self._plain_errors(name), self.filesystem.open_input_file(self.path(name)) as source:
            buffer = PIECE_BYTES if piecewise else 0
            yield pq.ParquetFile(source, page_checksum_verification=True, buffer_size=buffer, pre_buffer=not piecewise)

    def circumstances(self, name: str) -> str | None:
        """What a Parquet file says that it was made from; None where it is absent or does not say."""
        try:
            with self.open_parquet(name) as file:
                value = (file.schema_arrow.metadata or {}).get(CIRCUMSTANCES.encode())
        except FileNotFoundError:
            return None
        return None if value is None else value.decode()

    def iter_batches(self, name: str, *, columns: Sequence[str], first: int = 0) -> Iterator[pa.RecordBatch]:
        """One Parquet file from row ``first`` on, ``BATCH_ROWS`` rows or fewer at a time, in order.

        Raises FileNotFoundError.
        """
        with self.open_parquet(name) as file:
            yield from rows_of(file, columns=columns, first=first)

    def remove_temporaries(self) -> None:
        """Remove what writers that were killed left in this output (local only: S3 leaves nothing).

        Only for a job that holds the output. Folders that are outputs themselves are left to their own jobs.
        """
        if self.is_local:
            for folder, inner, files in os.walk(self.root):
                here = Path(folder)
                if folder != self.root and (here / INTERNAL_FOLDER).is_dir():
                    inner.clear()
                    continue
                for left in [name for name in (*inner, *files) if name.startswith(TEMPORARY)]:
                    _discard(here / left)
                inner[:] = [name for name in inner if not name.startswith(TEMPORARY)]

    def check_writable(self) -> None:
        """Raise OSError unless a file can be made here."""
        probe = f"{INTERNAL_FOLDER}/probe-{uuid.uuid4().hex}"
        self.write_internal(probe, b"lemon")
        self.remove_internal(probe)

    @contextlib.contextmanager
    def _plain_errors(self, name: str) -> Iterator[None]:
        """What S3 says goes on as one line with the path and the HTTP status."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            reason = s3.reason_of(str(error))
            if reason is None:
                raise
            if s3.GONE.search(str(error)):
                raise FileNotFoundError(f"{self.uri}/{name}: no such file") from None
            raise StorageError(f"{self.uri}/{name}: {reason}") from None


def rows_of(
    file: pq.ParquetFile, *, columns: Sequence[str], first: int = 0, batch_rows: int = BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """The rows of a Parquet file from ``first`` on, ``batch_rows`` or fewer at a time, in order."""
    # Row group by row group: over several, pyarrow keeps what it has read (measured: 655 MB of a 666 MB file).
    for group in range(file.num_row_groups):
        if first >= (count := file.metadata.row_group(group).num_rows):
            first -= count
            continue
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[*columns]):
            if first < len(batch):
                yield batch.slice(first)
            first = max(0, first - len(batch))


def parse_json(content: bytes, kind: Any, *, label: str) -> Any:
    """The value of JSON as the type that pydantic makes of it; raises DamagedError, a line that begins with ``label``.

    Python's own reader would end in six ways, from RecursionError to a list where a dictionary was meant.
    """
    try:
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        reason = f"{where}: {fault['msg']}" if where else fault["msg"]
        raise DamagedError(
            f"{label}: is damaged or of another program ({reason}); restore it, or move it away and run again"
        ) from None


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether a path is on object storage."""
    return "://" in str(path) and not str(path).startswith("file://")


def locate(path: str | os.PathLike[str]) -> tuple[Store, str]:
    """The store of the folder that a file or folder lies in, and its name there. Raises ValueError as ``Store``."""
    folder, slash, name = str(path).rstrip("/").rpartition("/")
    if folder.endswith(":/"):  # s3://bucket
        return Store(path), ""
    return Store(folder or slash or "."), name


def path_exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file or folder, local or at s3://. Raises ValueError as ``Store``."""
    store, name = locate(path)
    return store.exists(name)


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A local path for libraries that take no other: of a file or folder at s3:// a copy, while the block lasts.

    Raises FileNotFoundError where there is nothing at s3://; a local path is not looked at.
    """
    if not is_uri(path):
        yield Path(path).expanduser()
        return
    store, name = locate(path)
    with scratch_folder() as scratch:
        copy = scratch / (name or "bucket")
        store.download(name, copy)
        yield copy


def open_output(uri: str, *, names: Sequence[str] = ()) -> Store:
    """The store of ``output=``, after a file was made there.

    Raises ConfigError where it cannot be written, or where what LEMON did not write has one of the ``names`` (files
    and folders, by their names in the output) that the stage writes.
    """
    try:
        store = Store(uri)
        with _noticed(f"output: {store.uri} does not answer yet; it is asked for a minute"):
            store.records.require_all(names)  # first: nothing is written into somebody else's folder
            store.check_writable()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"output: cannot write to {uri!r}: {error}") from None
    return store


@contextlib.contextmanager
def _noticed(line: str) -> Iterator[None]:
    """Log a line when the block takes long."""
    notice = threading.Timer(NOTICE_S, logger.warning, (line,))
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    here = Path(__file__).resolve().parents[1]
    if not (here.parent / ".git").exists():
        return __version__
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+g{described}"
