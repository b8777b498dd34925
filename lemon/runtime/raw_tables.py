"""What is in a table's file: header and rows as they are written, out of CSV in all its spellings or Parquet."""

from __future__ import annotations

import codecs
import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lemon.runtime.identifiers import trimmed
from lemon.runtime.store import locate

TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
PARQUET_SUFFIXES = (".parquet", ".pq")
WORKBOOK_SUFFIXES = (".xlsx", ".xls", ".xlsm", ".ods")

SEPARATORS = (",", ";", "\t")

NESTED = object()
"""Stands for a Parquet value that is a list or the like."""

_MARKS = (  # UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_KINDS = (
    (b"PK\x03\x04", "an Excel workbook or a zip"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"\x1f\x8b", "compressed (gzip)"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
_PARQUET_MARK = b"PAR1"
_FIRST_LINE = re.compile(r'"?sep=([,;|:\t])"?[ ,;\t]*(?:\r\n|\r|\n|$)', re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_EXACT = 1 << 53  # a float64 above it has lost digits of an id


class TableError(Exception):
    """Why a table is refused, in one line: what comes behind its place."""


@dataclass(frozen=True)
class RawTable:
    """Header and columns, trimmed; ``lines`` is where each row begins, counted in ``counted``."""

    header: list[str]
    column: Callable[[int], list[Any]]
    lines: Sequence[int]
    counted: str  # line, or row where a file has no lines
    separator: str = ""
    notes: tuple[str, ...] = ()


def read_raw(path: str | Path, *, known: Sequence[str]) -> RawTable:
    """The table of a file, local or at s3://; the separator is chosen by the ``known`` columns. Raises TableError."""
    expected = f"expected a CSV or Parquet file with {', '.join(known)}"
    content = _content(path, expected)
    if content.startswith(_PARQUET_MARK) or str(path).lower().endswith(PARQUET_SUFFIXES):
        return _parquet(content)
    kind = next((kind for mark, kind in _KINDS if content.startswith(mark)), None)
    if kind is not None:
        raise TableError(f": {kind}; {expected}")
    text, notes = _decoded(content)
    if not trimmed(text):
        raise TableError(f": empty; {expected}")
    return _separated(text, known, notes)


def _content(path: str | Path, expected: str) -> bytes:
    if str(path).lower().endswith(WORKBOOK_SUFFIXES):
        raise TableError(f": a workbook; {expected}: save the sheet as CSV (UTF-8)")
    try:
        store, name = locate(path)
        if store.is_local and Path(store.path(name)).is_dir():
            raise TableError(f": a folder; {expected}")
        return store.read_bytes(name)
    except FileNotFoundError:
        raise TableError(f": no such file; {expected}") from None
    except (OSError, ValueError) as error:
        raise TableError(f": cannot be read: {' '.join(str(error).split())}") from None


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(content: bytes) -> RawTable:
    try:
        table = pq.ParquetFile(pa.BufferReader(content)).read()
    except (pa.ArrowException, OSError) as error:
        raise TableError(f": cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    header = ["" if name.startswith("__index_level_") else trimmed(name) for name in table.column_names]
    return RawTable(header, lambda index: _as_written(table.column(index)), range(1, table.num_rows + 1), "row")


def _as_written(column: pa.ChunkedArray) -> list[Any]:
    """A column's values as a person would write them; lists and the like as ``NESTED``."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        return [NESTED] * len(column)
    try:
        return [_text_of(value) for value in column.to_pylist()]
    except ValueError:  # bytes that are no text, moments that Python cannot hold
        return [NESTED] * len(column)


def _text_of(value: Any) -> str | None:
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return str(int(value))  # pandas writes 7 as 7.0 where the column has a gap
    return trimmed(value.decode() if isinstance(value, bytes) else str(value))


# --- text -------------------------------------------------------------------------------------------------------------


def _decoded(content: bytes) -> tuple[str, tuple[str, ...]]:
    """A file's text, and a note where its encoding was guessed."""
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    for name in (marked,) if marked else ("utf-8", "cp1252"):
        try:
            text = content.decode(name).removesuffix("\x1a")  # DOS's mark of the end
        except UnicodeDecodeError:
            continue
        _check_signs(text)
        note = "not UTF-8, read as Windows-1252; save it as UTF-8 if names look wrong"
        return text, (note,) if name == "cp1252" else ()
    tried = f"not {marked.upper().removesuffix('-SIG')}" if marked else "neither UTF-8 nor Windows-1252"
    raise TableError(f": {tried} text; expected a CSV table: save it as UTF-8")


def _check_signs(text: str) -> None:
    match = _CONTROL.search(text)
    if match:
        line = 1 + len(re.findall(r"\r\n|\r|\n", text[: match.start()]))
        sign = "a NUL byte" if match[0] == "\x00" else f"the control character U+{ord(match[0]):04X}"
        raise TableError(
            f", line {line}: holds {sign}; expected text: is it a binary file, or UTF-16? save it as UTF-8"
        )


def _separated(text: str, known: Sequence[str], notes: tuple[str, ...]) -> RawTable:
    separators: Sequence[str] = SEPARATORS
    first_line = 1
    if directive := _FIRST_LINE.match(text):
        separators, text, first_line = (directive[1],), text[directive.end() :], 2
    separator, header = _header_of(text, separators, known)
    columns: list[list[Any]] = [[] for _ in header]
    lines = []
    records = _records(text, separator, first_line=first_line)
    next(records)
    for line, record in records:
        _check_width(record, header, line)
        lines.append(line)
        for column, value in zip(columns, record, strict=False):
            column.append(value)
    return RawTable(header, columns.__getitem__, lines, "line", separator, notes)


def _header_of(text: str, separators: Sequence[str], known: Sequence[str]) -> tuple[str, list[str]]:
    """The separator whose header has the most known columns, then the most columns; and that header."""
    known_names, candidates = {loose(name) for name in known}, []
    for separator in separators:
        try:
            header = next(_records(text, separator))[1]
        except TableError as refused:  # quotes that make no sense with this separator
            why = refused
            continue
        except StopIteration:
            raise TableError(": no header; expected the names of its columns in the first line") from None
        candidates.append((sum(loose(name) in known_names for name in header), len(header), separator, header))
    if not candidates:
        raise why
    _, _, separator, header = max(candidates, key=lambda each: each[:2])
    return separator, header


def loose(name: str) -> str:
    """A header without what people spell in different ways: case, blanks, ``_``, ``-`` and ``.``."""
    return re.sub(r"[\s_.-]", "", unicodedata.normalize("NFKC", name).casefold())


def _records(text: str, separator: str, *, first_line: int = 1) -> Iterator[tuple[int, list[str]]]:
    """Records that are not blank, trimmed, each with the line that it begins in."""
    # Blanks between a closing quote and what ends the value; a quote that opens has a separator or a blank before it.
    text = re.sub(rf'(?<=[^"\r\n{separator}])" +(?=[\r\n{separator}]|$)', '"', text)
    # newline="" keeps line ends as they are inside quotes, and ends a line at \r, too.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    line = first_line
    try:
        for record in reader:
            values = [trimmed(value) for value in record]
            if any(values):
                yield line, values
            line = first_line + reader.line_num
    except csv.Error as error:
        why = "a quoted value has no end" if "unexpected end" in str(error) else str(error)
        raise TableError(f", line {line}: {why}; expected quotes around whole values, doubled inside them") from None


def _check_width(record: list[str], header: list[str], line: int) -> None:
    """Refuse a row that is too short or too long; blanks behind the last column are fine."""
    if len(record) < len(header) and not any(header[len(record) :]):
        record += [""] * (len(header) - len(record))
    if len(record) < len(header) or any(record[len(header) :]):
        got = f"has {len(record)} values for {len(header)} columns"
        raise TableError(f", line {line}: {got}; expected one a column, quoted where it holds the separator")
