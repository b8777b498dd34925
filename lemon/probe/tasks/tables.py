"""CSV tables of benchmarks, read with errors that name the file, the column and the value."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lemon.probe.task import TaskError


def read_rows(path: Path, *, columns: Sequence[str], optional: Sequence[str] = (), sep: str = ",") -> pd.DataFrame:
    """Columns of a CSV file as text, in the order asked for.

    Args:
        path: a CSV file with a header.
        columns: that it must have.
        optional: that are read where it has them.
        sep: what stands between values.

    Raises:
        TaskError: the file is absent or no CSV, or lacks a column.
    """
    try:
        table = pd.read_csv(path, sep=sep, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise TaskError(f"{path}: no such file; expected a table with the columns {', '.join(columns)}") from None
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); expected a CSV table: download it again") from None
    absent = [name for name in columns if name not in table.columns]
    if absent:
        has = ", ".join(str(name) for name in table.columns)
        raise TaskError(f"{path}: no column {absent[0]!r}; it has {has}; expected {', '.join(columns)}")
    return table[[*columns, *(name for name in optional if name in table.columns)]]


def numbers(table: pd.DataFrame, columns: Sequence[str], *, path: Path) -> np.ndarray:
    """Columns of text as float64 [N, C]; raises TaskError that names the first value that is no number."""
    values = table[list(columns)].apply(pd.to_numeric, errors="coerce")
    wrong = np.argwhere(values.isna().to_numpy())
    if len(wrong):
        row, column = wrong[0]
        got = table[columns[column]].iloc[row]
        raise TaskError(f"{path}: row {row + 1} has {columns[column]}={got!r}; expected a number: mend the row")
    return values.to_numpy(np.float64)


def check_labels(labels: Collection[str], known: Collection[str], *, where: Path) -> None:
    """Raise TaskError for the first label that the class map does not know."""
    for label in labels:
        if label not in known:
            close = difflib.get_close_matches(label, known, n=1)
            hint = f"; did the set rename {close[0]}?" if close else ""
            raise TaskError(f"{where}: unknown class {label!r}; expected one of {', '.join(sorted(known))}{hint}")
