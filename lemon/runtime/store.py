"""Where tables live: a folder or an s3:// prefix behind one small interface, with atomic writes and fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from lemon.config import ConfigError, StorageError
from lemon.version import __version__

logger = logging.getLogger(__name__)

BATCH_ROWS = 2048
"""Rows that a reader holds at most: of cells, 22 MB of crops."""

CIRCUMSTANCES = b"lemon.circumstances"
"""Key in a Parquet file's metadata: a fingerprint of all that the file was made from."""

S3_ATTEMPTS = 8
"""Tries of a request that S3 answers with 500, 503 or not at all; they wait for longer each time, a minute in all."""

S3_TIMEOUT_S = 20.0
"""Seconds until a connection, or an answer's next bytes, are given up."""

NOTICE_S = 10.0
"""Seconds without an answer after which a user is told what a job waits for."""

READERS = 16
"""Requests under way at once."""

# As pyarrow words it: AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate.
_AWS_ERROR = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during (\w+) operation:(.*)")
# The SDK writes what S3 answers into the buffer for the bytes that were asked for. Where that is smaller than the text
# of a 503, it fails in this way and does not ask again (pyarrow 25).
_NO_ROOM = "Failed to flush response stream"

# Of a file that was removed after its size was asked for.
_GONE = re.compile(r"AWS Error (NO_SUCH_KEY|RESOURCE_NOT_FOUND) during GetObject")

# pyarrow tells a status only where the SDK has no name for the error.
_STATUSES = {
    "SLOW_DOWN": "503",
    "SERVICE_UNAVAILABLE": "503",
    "INTERNAL_FAILURE": "500",
    "ACCESS_DENIED": "403",
    "SIGNATURE_DOES_NOT_MATCH": "403",
    "INVALID_ACCESS_KEY_ID": "403",
    "NO_SUCH_BUCKET": "404",
}

COPY_BYTES = 16 << 20
"""Bytes of a copy that are in memory; each is a request."""

TEMPORARY = ".tmp-"
"""Marks a file that is being written; readers and listings pass over it."""


class Store:
    """A folder of files, local or on object storage.

    Names are relative, with forward slashes. ``write`` is atomic on both: a reader sees the whole file or none.
    On S3, endpoint, region and credentials come from where AWS's own tools have them: the environment, a profile, the
    machine's role. Raises ValueError for a URI that is not ``s3://bucket/prefix``, or that holds more than that.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        uri = str(uri)
        self.is_local = not is_uri(uri)
        if self.is_local:
            self.root = str(Path(uri.removeprefix("file://")).expanduser().absolute())
            self.filesystem, self.uri = pafs.LocalFileSystem(), self.root
        else:
            self.root = _s3_root(uri)
            self.filesystem, self.uri = _s3(self.root.partition("/")[0], *_endpoint()), f"s3://{self.root}"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)  # pyarrow's S3 filesystem would lose its retries on the way to a worker

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def path(self, name: str) -> str:
        """The path of ``name`` as ``self.filesystem`` spells it."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether a file (or folder) of that name is there. On S3 two requests: for many, ``list`` once."""
        with self._plain_errors(name):
            return self.filesystem.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        with self._plain_errors(name):
            info = self.filesystem.get_file_info(self.path(name))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}/{name}: no such file")
        return int(info.size)

    def list(self, folder: str, *, suffix: str = "") -> list[str]:
        """Names of the files below ``folder`` that end in ``suffix``, sorted; an absent folder is empty."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        with self._plain_errors(folder):
            infos = self.filesystem.get_file_info(selector)
        found = (info.path for info in infos if info.type == pafs.FileType.File)
        names = (path[len(self.root) :].lstrip("/") for path in found)
        return sorted(name for name in names if name.endswith(suffix) and TEMPORARY not in name)

    def entries(self, folder: str) -> set[str]:
        """Names of the files and folders right in a folder; an absent folder is empty."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        with self._plain_errors(folder):
            infos = self.filesystem.get_file_info(selector)
        return {info.path[len(self.root) :].strip("/") for info in infos}

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all below it; absent is fine, also where another process removes it now."""
        with self._plain_errors(name), contextlib.suppress(FileNotFoundError):
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
        # An object appears when its upload completes, and closing a stream completes it, also after an error. So the
        # content is made whole on local disk first, and uploaded by a thread, which no signal interrupts.
        with tempfile.NamedTemporaryFile(prefix="lemon-upload-") as spool:
            yield spool
            spool.flush()
            with self._plain_errors(name), ThreadPoolExecutor(1) as thread:
                thread.submit(self._upload, spool.name, name).result()

    def _upload(self, path: str, name: str) -> None:
        # Not pyarrow's copy_files: where the server refuses a small file, it reports success (pyarrow 25).
        with Path(path).open("rb") as source, self.filesystem.open_output_stream(self.path(name)) as target:
            shutil.copyfileobj(source, target, COPY_BYTES)

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

        def fetch(found: str) -> None:
            self.download(found, Path(target) / found[len(name) :].lstrip("/"))

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fetch, names))

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
        for attempt in range(1, S3_ATTEMPTS + 1):
            try:
                # Not a stream: that asks S3 for 256 KB at a time.
                with self._plain_errors(name), self.filesystem.open_input_file(self.path(name)) as file:
                    return bytes(file.read(file.size()))
            except StorageError as error:
                if _NO_ROOM not in str(error) or attempt == S3_ATTEMPTS:
                    raise
                time.sleep(min(10.0, 0.2 * 2**attempt))
        raise AssertionError

    def read_json(self, name: str) -> Any:
        """A JSON file's value. Raises FileNotFoundError."""
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str, **options: Any) -> pa.Table:
        """One Parquet file. Raises FileNotFoundError."""
        with self._plain_errors(name):
            return pq.read_table(self.path(name), filesystem=self.filesystem, **options)

    def read_tables(self, folder: str, *, schema: pa.Schema) -> pa.Table:
        """The small Parquet files of a folder as one table, in the order of their names; columns they lack are null.

        Each file is read whole, several at a time: what it takes are requests, not bytes.
        """

        def read(name: str) -> pa.Table:
            return pq.ParquetFile(pa.BufferReader(self.read_bytes(name))).read(use_threads=False)

        with ThreadPoolExecutor(READERS) as pool:
            tables = list(pool.map(read, self.list(folder, suffix=".parquet")))
        whole = pa.concat_tables([schema.empty_table(), *tables], promote_options="default").select(schema.names)
        absent = [bool(column.null_count) for column in whole.columns]  # in tables of another kind, for readers to tell
        return whole.cast(
            pa.schema(
                [field.with_nullable(field.nullable or some) for field, some in zip(schema, absent, strict=False)]
            )
        )

    @contextlib.contextmanager
    def open_parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file to read piece by piece. Raises FileNotFoundError."""
        with self._plain_errors(name), self.filesystem.open_input_file(self.path(name)) as source:
            yield pq.ParquetFile(source)

    def circumstances(self, name: str) -> str | None:
        """What a Parquet file says that it was made from; None where it is absent or does not say."""
        try:
            with self.open_parquet(name) as file:
                found = (file.schema_arrow.metadata or {}).get(CIRCUMSTANCES)
        except FileNotFoundError:
            return None
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
    def _plain_errors(self, name: str) -> Iterator[None]:
        """What S3 says goes on as one line with the path and the HTTP status."""
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            told = _aws_error(str(error))
            if told is None:
                raise
            if _GONE.search(str(error)):
                raise FileNotFoundError(f"{self.uri}/{name}: no such file") from None
            raise StorageError(f"{self.uri}/{name}: {told}") from None


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
    with tempfile.TemporaryDirectory(prefix="lemon-copy-") as scratch:
        copy = Path(scratch) / (name or "bucket")
        store.download(name, copy)
        yield copy


def open_output(uri: str) -> Store:
    """The store of ``output=``, after a file was made there. Raises ConfigError."""
    try:
        store = Store(uri)
        with _noticed(f"output: {store.uri} does not answer yet; it is asked for a minute"):
            store.check_writable()
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


def _s3_root(uri: str) -> str:
    """bucket/prefix of a URI, which is told in errors only where it holds no secret."""
    parts = urllib.parse.urlsplit(uri)
    if parts.query or parts.username or parts.password:
        raise ValueError(
            f"{parts.scheme}://...{parts.path}: holds a key or an option; expected s3://bucket/prefix alone, the rest "
            "in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL or a profile"
        )
    if parts.scheme != "s3" or not parts.netloc:
        raise ValueError(f"{uri}: expected a local path or s3://bucket/prefix")
    return uri.removeprefix("s3://").rstrip("/")


def _endpoint() -> tuple[str | None, str | None]:
    """Endpoint and region that the environment names."""
    env = os.environ
    endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
    return endpoint, env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION")


@cache
def _s3(bucket: str, endpoint: str | None, region: str | None) -> pafs.S3FileSystem:
    """One client a process, endpoint and bucket, so that connections are used again."""
    if region is None and endpoint is None:
        with contextlib.suppress(OSError):  # what comes next tells it
            region = pafs.resolve_s3_region(bucket)
    host = urllib.parse.urlsplit(endpoint or "").hostname or (endpoint or "").partition(":")[0]
    return pafs.S3FileSystem(
        region=region or ("us-east-1" if endpoint else None),
        endpoint_override=endpoint,
        scheme="http" if host in ("localhost", "127.0.0.1", "::1") else "https",  # of an endpoint that names none
        connect_timeout=S3_TIMEOUT_S,
        request_timeout=S3_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        allow_delayed_open=True,  # a small file is one request and not three
    )


def _aws_error(text: str) -> str | None:
    """The reason in an error of pyarrow's S3 client: HTTP status and words; None for another error."""
    found = _AWS_ERROR.search(" ".join(text.split()))
    if found is None:
        return None
    name, status, operation, words = found.groups()
    status = status or _STATUSES.get(name)
    words = re.split(r"; Details| \(Request ID", words)[0].strip().rstrip(".")
    told = f"{f'HTTP {status}, ' if status else ''}{name} in {operation} after {S3_ATTEMPTS} attempts at most"
    return f"{told}: {words}" if words else told


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
