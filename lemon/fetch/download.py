"""Large files over HTTP into a folder: resumed where they stopped, checked by md5, renamed when they are whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from lemon.errors import one_line
from lemon.fetch.config import DownloadConfig
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.version import __version__

BLOCK_BYTES = 1 << 18
"""Bytes that are written at a time; of an answer that breaks off, less than that is lost."""

LONGEST_WAIT_S = 300
"""Bound of the waits between attempts, also of those that a server asks for."""

PARTS = f"{INTERNAL_FOLDER}/parts"
"""Where in the folder files are until they are whole."""

TRANSIENT = (429, 500, 502, 503, 504)


class DownloadError(Exception):
    """A file cannot be had; the message is one line."""


class StoppedError(Exception):
    """The downloader was told to stop; what there is of the file stays."""


class _InterruptedError(Exception):
    """An answer broke off; the next one may go on."""


@dataclass(frozen=True)
class RemoteFile:
    """A file to download, and how to know it."""

    url: str
    name: str
    size_bytes: int
    md5: str


def open_session(config: DownloadConfig) -> requests.Session:
    """A session whose requests are repeated until an answer begins: on refused or broken connections, timeouts, 429
    and 5xx, after the time that Retry-After names, else after a growing one with jitter.
    """
    retry = Retry(
        total=config.attempts - 1,
        status_forcelist=TRANSIENT,
        allowed_methods=None,  # the POST of the GDC is a query
        backoff_factor=config.backoff_s,
        backoff_jitter=config.backoff_s,
        backoff_max=LONGEST_WAIT_S,
        retry_after_max=LONGEST_WAIT_S,
    )
    session = requests.Session()
    session.headers["User-Agent"] = f"lemon-nuclei/{__version__}"
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


class Downloader:
    """Downloads into one folder, from any number of threads; ``progress`` is called with bytes won (or lost: < 0)."""

    def __init__(
        self, folder: Path, config: DownloadConfig, *, progress: Callable[[int], object] = lambda _: None
    ) -> None:
        self.folder, self.config, self.progress = folder, config, progress
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._promised = 0  # bytes that downloads under way have yet to write

    def get(self, file: RemoteFile) -> Path:
        """The file in the folder, downloaded unless it is there already.

        What an earlier attempt left in ``.lemon/parts/``, also of a process that was killed, is continued.

        Raises:
            DownloadError: it cannot be had: an answer that is no use to repeat, too many failures in a row, no room;
                or another file has its name.
            StoppedError: ``stop`` was called.
        """
        target = self.folder / file.name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if _size(target) == file.size_bytes and _digest(target) == file.md5:  # killed before anybody noted it
                self.progress(file.size_bytes)
                return target
            if target.exists():
                raise DownloadError(f"{target} is another file than the one to download; move it away")
            part = self.folder / PARTS / file.name
            part.parent.mkdir(parents=True, exist_ok=True)
            self.progress(_size(part))
            with self._room(file, part):
                self._transfer(file, part)
            part.replace(target)
        except OSError as error:
            raise DownloadError(f"cannot write {target}: {error.strerror or error}") from error
        return target

    def stop(self) -> None:
        """Make all downloads end soon."""
        self.stopped.set()

    @contextlib.contextmanager
    def _room(self, file: RemoteFile, part: Path) -> Iterator[None]:
        """Set aside what the rest of a file will take, beside what others were promised. Raises DownloadError."""
        needed = file.size_bytes - _size(part)
        reserve = int(self.config.reserve_gb * 1e9)
        with self._lock:
            free = shutil.disk_usage(self.folder).free - self._promised
            if free - needed < reserve:
                raise DownloadError(
                    f"no room: {needed / 1e9:.2f} GB to come, {free / 1e9:.2f} GB free in {self.folder}, of which "
                    f"download.reserve_gb={self.config.reserve_gb:g} is to stay"
                )
            self._promised += needed
        try:
            yield
        finally:
            with self._lock:
                self._promised -= file.size_bytes - _size(part)

    def _advance(self, n_bytes: int) -> None:
        with self._lock:
            self._promised -= n_bytes
        self.progress(n_bytes)

    def _transfer(self, file: RemoteFile, part: Path) -> None:
        """Request after request until the file is whole and right; only attempts that bring nothing new count."""
        failures, furthest, reason = 0, _size(part), ""
        while failures < self.config.attempts:
            if failures:
                longest = min(LONGEST_WAIT_S, self.config.backoff_s * 2 ** (failures - 1))
                self.stopped.wait(random.uniform(0.5, 1) * longest)
            with part.open("a+b") as stream:
                try:
                    _lock(stream)
                    digest = self._append(file, stream)
                    if digest == file.md5:
                        return
                    reason = f"md5 is {digest}, expected {file.md5}"
                    self._empty(stream)
                    failures += 1
                except _InterruptedError as error:
                    reason = str(error)
                    failures = 0 if stream.tell() > furthest else failures + 1
                furthest = max(furthest, stream.tell())
        raise DownloadError(f"{reason}; given up after {self.config.attempts} attempts that brought nothing new")

    def _append(self, file: RemoteFile, stream: BufferedRandom) -> str:
        """One request for what ``stream`` lacks; returns the md5 of all it then holds. Raises _InterruptedError."""
        if stream.seek(0, os.SEEK_END) > file.size_bytes:
            self._empty(stream)
        stream.seek(0)
        digest = hashlib.file_digest(stream, _md5)
        if stream.tell() == file.size_bytes:
            return digest.hexdigest()
        with open_session(self.config) as session, self._request(session, file, offset=stream.tell()) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                self._empty(stream)
                raise _InterruptedError("HTTP 416: the server does not have the rest of the file")
            goes_on = response.status_code == requests.codes.partial_content
            _check_length(response, expected=file.size_bytes - (stream.tell() if goes_on else 0))
            if stream.tell() and not goes_on:  # the server ignores ranges
                self._empty(stream)
                digest = _md5()
            try:
                for block in response.iter_content(BLOCK_BYTES):
                    if self.stopped.is_set():
                        raise StoppedError
                    stream.write(block)
                    digest.update(block)
                    self._advance(len(block))
                    if stream.tell() > file.size_bytes:
                        raise _InterruptedError(f"the server sends more than {file.size_bytes} bytes")
            except requests.RequestException as error:
                raise _InterruptedError(f"broken off at byte {stream.tell()}: {one_line(error)}") from error
        if stream.tell() < file.size_bytes:
            raise _InterruptedError(f"broken off at byte {stream.tell()} of {file.size_bytes}")
        stream.flush()
        os.fsync(stream.fileno())
        return digest.hexdigest()

    def _request(self, session: requests.Session, file: RemoteFile, *, offset: int) -> requests.Response:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        if self.stopped.is_set():
            raise StoppedError
        try:
            response = session.get(file.url, headers=headers, stream=True, timeout=self.config.timeout_s)
        except requests.RequestException as error:
            raise DownloadError(f"{file.url}: {one_line(error)}") from error
        if response.status_code >= 400 and response.status_code != requests.codes.requested_range_not_satisfiable:
            response.close()
            raise DownloadError(f"{file.url}: HTTP {response.status_code} {response.reason}")
        return response

    def _empty(self, stream: BufferedRandom) -> None:
        self._advance(-stream.seek(0, os.SEEK_END))
        stream.truncate(0)
        stream.seek(0)


def _lock(stream: BufferedRandom) -> None:
    """Until the file is closed, nobody else writes to it: another job, or one that outlives its killed parent."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _InterruptedError("another process is downloading it") from None
    except OSError:
        pass  # a file system without locks, as Lustre is often mounted


def _check_length(response: requests.Response, *, expected: int) -> None:
    """An answer of another length is another thing, such as a page of a proxy: nothing of it is kept."""
    announced = response.headers.get("Content-Length")
    if announced is not None and int(announced) != expected:
        raise _InterruptedError(f"the server announces {announced} bytes, expected {expected}")


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, _md5).hexdigest()


def _size(path: Path) -> int:
    """Size of a file in bytes; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
