"""Shards: Parquet files with a digest of their rows that does not depend on how they are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lemon.runtime.store import BATCH_ROWS, Store, rows_of
from lemon.schema import DIGEST, fault_of, with_absent


class RowsDigest:
    """SHA-256 over rows of one schema: the same however they are cut into batches, row groups and chunks."""

    def __init__(self, schema: pa.Schema) -> None:
        # A stream for each kind of a column's bytes: in one stream they would alternate with the chunks.
        self._columns = {name: (hashlib.sha256(), hashlib.sha256(), hashlib.sha256()) for name in schema.names}

    def update(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Take the next rows."""
        for name, streams in self._columns.items():
            column = rows[name]
            for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                for stream, part in zip(streams, _parts(chunk), strict=True):
                    stream.update(part)

    def hexdigest(self) -> str:
        """32 hexadecimal digits of the rows so far."""
        digest = hashlib.sha256()
        for name, streams in self._columns.items():
            digest.update(name.encode() + b"\0" + b"".join(stream.digest() for stream in streams))
        return digest.hexdigest()[:32]


def _parts(values: pa.Array) -> tuple[Any, Any, Any]:
    """Which values are there, their lengths where these differ, and the values: without what is of Arrow's layout."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    valid, lengths = pc.is_valid(values).to_numpy(zero_copy_only=False).tobytes(), b""
    content: Any = b""
    if not len(values):
        pass
    elif pa.types.is_fixed_size_list(values.type):
        content = np.ascontiguousarray(values.flatten().to_numpy(zero_copy_only=False)).data
    elif pa.types.is_fixed_size_binary(values.type):
        width = values.type.byte_width
        content = values.buffers()[1][values.offset * width : (values.offset + len(values)) * width]
    elif pa.types.is_string(values.type) or pa.types.is_binary(values.type):
        filled = pc.fill_null(values, "" if pa.types.is_string(values.type) else b"")
        lengths = pc.binary_length(filled).to_numpy(zero_copy_only=False).tobytes()
        content = b"".join(filled.cast(pa.binary()).to_pylist())
    else:
        content = pc.fill_null(values, 0).to_numpy(zero_copy_only=False).tobytes()
    return valid, lengths, content


class ShardWriter:
    """Writes the rows of one shard in pieces; ``digest`` is that of all when the block of ``write_shard`` has ended."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self._writer, self._rows = writer, RowsDigest(schema)
        self.n_rows = 0

    @property
    def digest(self) -> str:
        """Of the rows so far."""
        return self._rows.hexdigest()

    def write(self, rows: pa.Table, *, row_group_size: int | None = None) -> None:
        """Append rows."""
        self._writer.write_table(rows, row_group_size=row_group_size)
        self._rows.update(rows)
        self.n_rows += len(rows)


@contextmanager
def write_shard(store: Store, name: str, schema: pa.Schema, **options: Any) -> Iterator[ShardWriter]:
    """Write a shard piece by piece: it is there, with its digest in the metadata, when the block ends well."""
    with store.write(name) as stream, pq.ParquetWriter(stream, schema, write_page_checksum=True, **options) as writer:
        shard = ShardWriter(writer, schema)
        yield shard
        writer.add_key_value_metadata({DIGEST.decode(): shard.digest})


class ShardError(Exception):
    """A shard is absent, damaged or another one than its ledger names; the message is one line."""


def read_shard(
    store: Store,
    name: str,
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    digest: str | None = None,
    first: int = 0,
    batch_rows: int = BATCH_ROWS,
) -> Generator[pa.RecordBatch]:
    """A shard's rows, ``batch_rows`` or fewer at a time, in order; checksums of pages are compared.

    Args:
        store, name: where it is.
        schema: of the table that it must be a part of.
        columns: to read.
        digest: that its metadata must state; None takes any.
        first: the row to begin with.
        batch_rows: fewer than BATCH_ROWS: little is held of a row group, which is read as it is needed.

    Raises ShardError.
    """
    try:
        with store.open_parquet(name, piecewise=batch_rows < BATCH_ROWS) as file:
            fault = fault_of(file.schema_arrow, schema)
            there = [column for column in columns if column in file.schema_arrow.names]
            optional = {field.name for field in schema if field.nullable}
            absent = [name for name in columns if name not in there and name not in optional]
            stated = digest_in(file)
            if fault or absent:
                raise ShardError(f"{name}: {fault or f'has no column {absent[0]}'}")
            if digest is not None and stated != digest:
                raise ShardError(f"{name}: holds other rows than its ledger says (digest {stated}, not {digest})")
            asked = pa.schema([schema.field(name) for name in columns if name in schema.names])
            for batch in rows_of(file, columns=there, first=first, batch_rows=batch_rows):
                yield with_absent(batch, asked) if len(there) < len(columns) else batch
    except (OSError, pa.ArrowException) as error:
        raise ShardError(f"{name}: cannot be read: {' '.join(str(error).split())}") from None


def digest_in(file: pq.ParquetFile) -> str | None:
    """The digest that a shard's metadata states; None where it states none."""
    digest = (file.metadata.metadata or {}).get(DIGEST)
    return None if digest is None else digest.decode()
