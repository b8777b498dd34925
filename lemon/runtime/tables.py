"""The one reader of tables that users give: CSV in all its spellings, and Parquet.

What it takes, for every table alike:

- UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one, else Windows-1252, with a note;
- comma, semicolon or tab, whichever finds the most known columns in the header; Excel's first line ``sep=;``;
- lines that end in ``\\n``, ``\\r\\n`` or ``\\r``; quoted values with separators and line ends inside; blank lines;
- headers and values without the blanks around them. A header that differs from a known one only in case, blanks,
  ``_``, ``-`` or ``.`` is that column, with a note; two headers for one column are refused, and so is any other name
  that occurs twice; unknown columns are noted with the nearest known name;
- the words of ``MISSING`` (in any case) as no value, with a note where a word stood there;
- everything else as text, as it is written: ``007``, ``1e5``, ``True`` and dates are ids. Parquet's numbers become the
  text that a person would write: 7 and 7.0 are ``7``;
- numbers only in columns that are declared as such: finite, within bounds, with a point, or with a decimal comma where
  the separator is no comma.

Everything else is refused in one line with the file, the line and the column.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemon.errors import ConfigError
from lemon.runtime.identifiers import some
from lemon.runtime.raw_tables import (
    NESTED,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    WORKBOOK_SUFFIXES,
    RawTable,
    TableError,
    loose,
    read_raw,
)

logger = logging.getLogger(__name__)

MISSING = frozenset(["", "na", "n/a", "#n/a", "<na>", "nan", "none", "null", "nil", "-", "--"])
"""Words that mean no value, in lower case."""

_LONGEST = max(map(len, MISSING))
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)


@dataclass(frozen=True)
class Column:
    """A column that a table may have.

    Args:
        name: as it is spelled.
        required: the table must have it.
        filled: every row must have a value.
        number: the bounds, both allowed, of a column of numbers; None: text.
        unit: of the number, for messages.
        keep: words of ``MISSING`` that are values here.
    """

    name: str
    required: bool = True
    filled: bool = False
    number: tuple[float, float] | None = None
    unit: str = ""
    keep: frozenset[str] = frozenset()

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        if self.number is None:
            return "a value"
        low, high = self.number
        if math.isinf(low) and math.isinf(high):
            return "a number"
        bounds = f"{low:g} or more" if math.isinf(high) else f"{low:g} to {high:g}"
        return f"{bounds} {self.unit}".rstrip()


ANY_NUMBER = (-math.inf, math.inf)


@dataclass(frozen=True)
class Form:
    """What a table is: its columns and how it is spoken of.

    Args:
        what: stands before the file's name in messages: ``slides: cohort``.
        columns: those that are read.
        others: whether columns besides them are usual, as in published data sets, and not worth a line.
        may_be_empty: whether a header without rows is fine.
        error: what is raised.
    """

    what: str
    columns: tuple[Column, ...]
    others: bool = False
    may_be_empty: bool = False
    error: type[Exception] = ConfigError

    @property
    def names(self) -> list[str]:
        """Names of the columns."""
        return [column.name for column in self.columns]


@dataclass(frozen=True)
class UserTable:
    """A table that was read: known columns that the file has, in the form's order, as text, float or None."""

    place: str
    columns: dict[str, list[Any]]
    lines: Sequence[int]
    """Where each row is: its first line in the file, or its number in a Parquet file."""
    counted: str = "line"
    notes: tuple[str, ...] = field(default=())
    """Notes on how it was read, a line each."""

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Row after row by column."""
        for values in zip(*self.columns.values(), strict=True):
            yield dict(zip(self.columns, values, strict=True))

    def where(self, index: int) -> str:
        """The file and the line of a row, for messages."""
        return f"{self.place}, {self.counted} {self.lines[index]}"


def read_user_table(path: str | Path, *, form: Form) -> UserTable:
    """Read a table that a user gives, local or at s3://; what was assumed is logged, a line each.

    Raises the form's error, in one line, where it cannot be read or is not of the form.
    """
    place = f"{form.what} {path}".strip()
    try:
        raw = read_raw(path, known=form.names)
        positions, notes = _match_columns(raw.header, form)
        if not raw.lines and not form.may_be_empty:
            raise TableError(f": no rows behind its header; expected rows of {', '.join(positions)}")
        columns = {}
        for column in (each for each in form.columns if each.name in positions):
            columns[column.name], column_notes = _values(raw, positions[column.name], column)
            notes += column_notes
    except TableError as refused:
        raise form.error(_one_line(f"{place}{refused}")) from None
    lines = tuple(_one_line(f"{place}: {note}") for note in (*raw.notes, *notes))
    for line in lines:
        logger.warning("%s", line)
    return UserTable(place, columns, raw.lines, raw.counted, lines)


def _one_line(text: str) -> str:
    """Text without the line ends that headers and values may have."""
    return " ".join(text.split())


# --- columns ----------------------------------------------------------------------------------------------------------


def _match_columns(header: list[str], form: Form) -> tuple[dict[str, int], list[str]]:
    """Positions of the known columns, and notes. Headers without a name are skipped."""
    named = Counter(name for name in header if name)
    twice = [name for name, count in named.items() if count > 1]
    if twice:
        raise TableError(f": {named[twice[0]]} columns {twice[0]!r}; expected one: rename or delete the other")
    known = {loose(name): name for name in form.names}
    positions: dict[str, int] = {}
    notes: list[str] = []
    for index, name in enumerate(header):
        meant = name if name in form.names else known.get(loose(name)) if name else None
        if meant is None:
            continue
        if meant in positions:
            pair = f"{header[positions[meant]]} and {name}"
            raise TableError(f": the columns {pair} are both {meant}; expected one: rename or delete the other")
        positions[meant] = index
        if meant != name:
            notes.append(f"the column {name!r} is read as {meant}")
    unknown = [name for index, name in enumerate(header) if name and index not in positions.values()]
    _check_required(header, unknown, positions, form)
    notes += _unused_columns_note(unknown, [name for name in form.names if name not in positions], others=form.others)
    return positions, notes


def _check_required(header: list[str], unknown: list[str], positions: dict[str, int], form: Form) -> None:
    absent = [column.name for column in form.columns if column.required and column.name not in positions]
    if not absent:
        return
    near = difflib.get_close_matches(absent[0], unknown, n=1, cutoff=0.6)
    hint = f": rename {near[0]!r}?" if near else ""
    expected = ", ".join(column.name for column in form.columns if column.required)
    raise TableError(f": no column {absent[0]!r}; it has {some(header, shown=12)}; expected {expected}{hint}")


def _unused_columns_note(unknown: list[str], free: list[str], *, others: bool) -> list[str]:
    """A line on columns that are not read, with what each may have been meant to be."""
    if not unknown or others:
        return []
    hints = []
    for name in unknown:
        near = difflib.get_close_matches(name.casefold(), free, n=1, cutoff=0.6)
        near = near or [column for column in free if column.split("_")[0] == loose(name)]
        hints += [f"{name!r}: did you mean {near[0]}?"] if near else []
    plural = "columns are" if len(unknown) > 1 else "column is"
    line = f"{len(unknown)} {plural} not used ({some(unknown)})"
    return [f"{line}; {some(hints)}" if hints else line]


# --- values -----------------------------------------------------------------------------------------------------------


def _values(raw: RawTable, index: int, column: Column) -> tuple[list[Any], list[str]]:
    """A column's values, and a line on the words that were taken for none."""
    words = MISSING - column.keep
    missing: Counter[str] = Counter()
    values: list[Any] = raw.column(index)
    for row, text in enumerate(values):
        if text is NESTED:
            raise TableError(f": {column.name} holds no text; expected {column.expected} in each row")
        if text is None or (len(text) <= _LONGEST and text.casefold() in words):
            missing[text or ""] += 1
            values[row] = None
            if column.filled:
                place = f", {raw.counted} {raw.lines[row]}, column {column.name}"
                raise TableError(f"{place}: got {text or 'nothing'}; expected {column.expected}: mend the row")
        elif column.number is not None:
            values[row] = _number(text, column, raw, row)
    said = [f"{word} ({count})" for word, count in missing.items() if word]
    return values, [f"column {column.name}: {some(said)} read as no value"] if said else []


def _number(text: str, column: Column, raw: RawTable, row: int) -> float:
    plain = text.replace(",", ".") if raw.separator != "," and _DECIMAL_COMMA.fullmatch(text) else text
    value = float(plain) if _NUMBER.fullmatch(plain) else math.nan
    low, high = column.number or ANY_NUMBER
    if not (math.isfinite(value) and low <= value <= high):
        place = f", {raw.counted} {raw.lines[row]}, column {column.name}"
        raise TableError(f"{place}: got {text!r}; expected {column.expected}: mend the row")
    return value


def is_table(name: str) -> bool:
    """Whether a word of the user's names a table by its suffix."""
    return name.lower().endswith((*TEXT_SUFFIXES, *PARQUET_SUFFIXES, *WORKBOOK_SUFFIXES))
