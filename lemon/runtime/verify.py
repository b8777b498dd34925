"""Reads all that LEMON wrote in an output and compares it with its records: what is damaged, lost or changed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import Field
from tqdm import tqdm

from lemon.errors import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.runtime.config import AnyPath, Frozen
from lemon.runtime.records import FILES
from lemon.runtime.shards import digest_in
from lemon.runtime.store import READERS, Store
from lemon.schema import EMBEDDED, SLIDES

REMEDY = "delete it, and the job that wrote it makes it again"


class VerifyConfig(Frozen):
    """``lemon verify``: reads all that LEMON wrote in an output and compares it with its records."""

    output: AnyPath = Field(description="folder or s3:// prefix of any job's output, with outputs inside it")


@dataclass(frozen=True)
class FileFault:
    """What is wrong with a file of an output."""

    name: str
    reason: str


def main(config: VerifyConfig) -> int:
    """Verify an output and the outputs inside it; prints a line for each fault; returns the exit code: 3 for any."""
    store = Store(config.output)
    if store.info("").type == pafs.FileType.File:
        raise ConfigError(f"output: {store.uri} is a file; expected the folder of a job's output")
    outputs = sorted(outputs_in(store))
    if not outputs:
        raise ConfigError(f"output: {store.uri} holds nothing that this version of lemon wrote")
    n_files, faults = 0, []
    for folder in outputs:
        inner = Store(f"{store.uri}/{folder}".rstrip("/"))
        names = sorted(inner.records.names(""))
        n_files += len(names)
        above = f"{folder}/".lstrip("/")
        inside = [other.removeprefix(above) for other in outputs if other != folder and other.startswith(above)]
        new_faults = [
            *verify_files(inner, names),
            *unrecorded_files(inner, names, inside=inside),
            *verify_ledgers(inner),
        ]
        faults += [FileFault(above + fault.name, fault.reason) for fault in new_faults]
    for fault in faults:
        print(f"  {fault.name}: {fault.reason}")
    print(f"verify: {n_files:,} files in {store.uri}; {len(faults)} are not as they were written")
    return EXIT_FAILURES if faults else EXIT_OK


def outputs_in(store: Store) -> set[str]:
    """Folders of a store, "" among them, in which LEMON keeps records."""
    paths = store.filesystem.get_file_info(pafs.FileSelector(store.path(""), allow_not_found=True, recursive=True))
    mark = f"/{FILES}/"
    names = (f"/{info.path[len(store.root) :].strip('/')}" for info in paths if info.type == pafs.FileType.File)
    return {name[: name.index(mark)].strip("/") for name in names if mark in name}


def verify_files(store: Store, names: list[str]) -> Iterator[FileFault]:
    """Compare recorded files with their records, byte by byte."""

    def reason(name: str) -> str | None:
        if store.info(name).type == pafs.FileType.NotFound:
            return "is gone; the job that wrote it makes it again"
        known = {record.sha256 for record in store.records.of(name)}
        if not known:
            return "has a damaged record; move the file away, and the job that wrote it makes it again"
        try:
            return None if store.records.digest(name) in known else f"is damaged or was changed; {REMEDY}"
        except OSError as error:
            return f"cannot be read: {error}"

    with ThreadPoolExecutor(READERS) as pool:
        reasons = tqdm(pool.map(reason, names), total=len(names), unit="file", desc="verify", disable=None)
        yield from (FileFault(name, why) for name, why in zip(names, reasons, strict=True) if why is not None)


def unrecorded_files(store: Store, names: list[str], *, inside: list[str]) -> Iterator[FileFault]:
    """Files without a record in the folders that LEMON writes, but for outputs ``inside``, which have their own."""
    for top in sorted({name.partition("/")[0] for name in names}):
        for name in store.records.foreign(top):
            if not name.startswith(tuple(f"{folder}/" for folder in inside)):
                yield FileFault(name, "has no record: lemon did not write it, or its record was lost; move it away")


def verify_ledgers(store: Store) -> Iterator[FileFault]:
    """Compare the shards of cells and embeddings with the rows of the slides table that name them."""
    for schema, folder, column in ((SLIDES, "cells", "cells_digest"), (EMBEDDED, "embeddings", "embeddings_digest")):
        if not store.exists(folder):
            continue
        try:
            rows = store.read_tables("slides", schema=schema).to_pylist()
        except ConfigError as error:
            yield FileFault("slides", str(error))
            continue
        stated = {row[column]: row["slide_id"] for row in rows if row[column]}
        for name in store.list(folder, suffix=".parquet"):
            try:
                with store.open_parquet(name) as file:
                    stated.pop(digest_in(file), None)
            except (OSError, pa.ArrowException):
                continue  # reported for the file itself
        for slide_id in stated.values():
            yield FileFault(
                folder, f"lacks the rows that the slides table states of {slide_id}; the same job makes them"
            )
