"""Which files LEMON may replace or remove: those of which it can show that it wrote them. The only place that decides.

Beside every file that a store writes lies a record, ``.lemon/files/<name>.json``: size, time and SHA-256 of the file,
written before the file gets its name, together with those of the file that it replaces. So after kill -9 between the
two either file is known. What is below ``.lemon/`` is LEMON's by its name.

A file with no record, or that is not as its record says (somebody changed it), is the user's: it is never replaced,
removed or read as LEMON's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs as pafs

from lemon.errors import ConfigError

if TYPE_CHECKING:
    from lemon.runtime.store import Store

INTERNAL_FOLDER = ".lemon"
"""Folder in an output of what only LEMON makes: records, the lease, attempts."""

FILES = f"{INTERNAL_FOLDER}/files"

MAX_REMOTE_BYTES = 16 << 20
"""Files of object storage up to here are read to be compared; of larger ones only the size is."""


class ForeignFileError(ConfigError):
    """A file is where LEMON would write, and LEMON did not write it; the message is one line."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: ``mtime_ns`` is None on object storage, and for a folder."""

    size_bytes: int
    sha256: str
    mtime_ns: int | None

    @classmethod
    def of(cls, path: Path, *, local: bool = True) -> FileRecord:
        """The record of a local file, or of a folder with all below it. Raises OSError."""
        if not path.is_dir():
            stat = path.stat()
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(stat.st_size, digest, stat.st_mtime_ns if local else None)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        parts = [(file.relative_to(path).as_posix(), cls.of(file)) for file in files]
        named = json.dumps([(name, part.sha256) for name, part in parts])
        return cls(sum(part.size_bytes for _, part in parts), hashlib.sha256(named.encode()).hexdigest(), None)


class Records:
    """The records of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def of(self, name: str) -> list[FileRecord]:
        """What is recorded of a file, the newest first; none where nothing is, or it is damaged."""
        try:
            entries = json.loads(self.store.read_bytes(_record_name(name)))
            return [FileRecord(**each) for each in entries]
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return []

    def names(self, folder: str) -> set[str]:
        """Files (and written folders) below ``folder`` of which there are records."""
        names = self.store.list(f"{FILES}/{folder}" if folder else FILES, suffix=".json")
        return {name.removeprefix(f"{FILES}/").removesuffix(".json") for name in names}

    def note(self, name: str, record: FileRecord, *, replaced: FileRecord | None) -> None:
        """Record a file that is about to get its name; what it replaces stays known until the next time."""
        both = [record] if replaced is None else [record, replaced]
        self.store.write_internal(_record_name(name), json.dumps([asdict(each) for each in both]).encode())

    def forget(self, name: str) -> None:
        """Drop the record of a file that is gone."""
        if not is_internal(name):
            self.store.remove_internal(_record_name(name))

    def agree(self, name: str) -> bool:
        """Whether a file is absent, or one that LEMON wrote, unchanged."""
        try:
            self.require(name)
        except ForeignFileError:
            return False
        return True

    def require(self, name: str) -> FileRecord | None:
        """The record of a file that may be replaced or removed; None where no file is there.

        Raises ForeignFileError where LEMON did not write it, or somebody changed it.
        """
        if is_internal(name) or (info := self.store.info(name)).type == pafs.FileType.NotFound:
            return None
        known = self.of(name)
        try:
            record = self._matching(name, info, known)
        except FileNotFoundError:  # another process is removing it
            return None
        if record is None:
            why = "was changed since lemon wrote it" if known else "was not written by lemon"
            raise ForeignFileError(f"{self.store.uri}/{name} {why}; move it away, or choose another output")
        return record

    def _matching(self, name: str, info: pafs.FileInfo, known: Sequence[FileRecord]) -> FileRecord | None:
        """Which of its records a file agrees with: by size and time, else by its digest."""
        if info.type == pafs.FileType.Directory:
            now = self.digest(name) if known else None
            return next((each for each in known if each.sha256 == now), None)
        alike = [each for each in known if each.size_bytes == info.size]
        in_time = [each for each in alike if each.mtime_ns == info.mtime_ns]
        if in_time or not alike:
            return next(iter(in_time), None)
        if not self.store.is_local and info.size > MAX_REMOTE_BYTES:
            return alike[0]
        digest = self.digest(name)
        return next((each for each in alike if each.sha256 == digest), None)

    def digest(self, name: str) -> str:
        """SHA-256 of a file, or of a local folder, as it is now. Raises FileNotFoundError."""
        if self.store.is_local:
            return FileRecord.of(Path(self.store.path(name))).sha256
        if self.store.size(name) <= MAX_REMOTE_BYTES:
            return hashlib.sha256(self.store.read_bytes(name)).hexdigest()
        with self.store.open_binary(name) as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def require_all(self, names: Sequence[str]) -> None:
        """Raise ForeignFileError where one of these files, or a file in one of these folders, has no record.

        By listings alone: each file is compared with its record when it is about to be replaced. Hidden files (of
        Finder, say) stand in nobody's way and stay.
        """
        foreign = [name for top in names for name in self.foreign(top)]
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise ForeignFileError(
                f"output: {self.store.uri} holds {foreign[0]}{others}, which this version of lemon did not write; "
                "move it away, or choose another output"
            )

    def foreign(self, top: str) -> list[str]:
        """Files below a name, or the file of that name, of which there is no record; hidden ones are left out."""
        if self.store.info(top).type == pafs.FileType.File:
            return [] if self.of(top) else [top]
        names = self.store.list(top)
        if not names:
            return []
        known = self.names(top)
        return [name for name in names if not (_is_hidden(name) or known.intersection(_with_parents(name)))]


def is_internal(name: str) -> bool:
    """Whether a name is one that only LEMON makes."""
    return name.split("/", 1)[0] == INTERNAL_FOLDER


def _record_name(name: str) -> str:
    return f"{FILES}/{name}.json"


def _is_hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _with_parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
