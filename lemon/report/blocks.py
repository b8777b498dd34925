"""What the report's page is built of: plain values, which the template escapes, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lemon.report.paper import Artefact, Printed
from lemon.sweep.studies import OverSeeds


class TableCell(NamedTuple):
    """A cell of a table: its text, a second line in small, whether it is the best, and the paper's number for it."""

    text: str
    small: str = ""
    best: bool = False
    paper: str = ""


@dataclass
class Table:
    """Titles of columns are (text, second line in small); the first cell of a row names it."""

    caption: str
    head: list[tuple[str, str]]
    rows: list[list[TableCell]]
    file: str | None = None


@dataclass
class Picture:
    """A figure as a data URI, and the files that hold it."""

    caption: str
    alt: str
    source: str
    files: list[str]


@dataclass
class Section:
    """A part of the page. ``facts``: what was used, of the paper and here."""

    key: str
    title: str
    artefact: Artefact | None = None
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def fixed(value: float | None) -> str:
    """A score: three decimals; empty for what is not known."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "\u2212")


def signed(value: float) -> str:
    """A difference of scores, with its sign."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\u2212")  # + 0.0: no negative zero


def bracketed(mean: float, spread: float | None) -> str:
    """mean (s.d.), or the mean alone."""
    return f"{fixed(mean)} ({fixed(spread)})" if fixed(spread) else fixed(mean)


def between(low: float, high: float) -> str:
    """The bounds of an interval; empty where there is none."""
    return f"{fixed(low)} to {fixed(high)}" if fixed(low) and fixed(high) else ""


def signed_interval(over: OverSeeds) -> str:
    """The bounds of an interval of a difference; empty for a single seed."""
    return f"{signed(over.low)} to {signed(over.high)}" if over.n > 1 else ""


def printed(number: Printed | None) -> str:
    """A number of the paper, as mean (s.d.)."""
    return "" if number is None else bracketed(number.value, number.spread)


def plural(count: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def span(values: Iterable[int | None]) -> str:
    """The least and the largest of some counts; empty where none is known."""
    known = sorted({value for value in values if value is not None})
    return " to ".join(f"{value:,}" for value in (known[:1] + known[1:][-1:]))


def listed(names: Iterable[str], *, most: int = 8) -> str:
    """Names once each, in their order, the first few of many."""
    distinct: Sequence[str] = list(dict.fromkeys(names))
    more = len(distinct) - most
    return ", ".join(distinct[:most]) + (f" and {more} more" if more > 0 else "")
