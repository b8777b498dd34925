"""What a page of results is built of: plain values, which the template escapes, and numbers as text.

A part of the page is a function ``(Report) -> Iterator[Section]`` in ``job.SECTIONS``; a section holds what it found in
sentences, pictures and tables. Nothing of it is markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from lemon.report.paper import Artefact, Printed


class Column(NamedTuple):
    """A column of a table.

    ``small``: a second line; ``tip``: shown when its title is pointed at; neighbours of one ``group`` stand under it;
    ``paper``: its numbers are the paper's.
    """

    title: str
    small: str = ""
    tip: str = ""
    group: str = ""
    paper: bool = False


class TableCell(NamedTuple):
    """A cell of a table.

    ``small``: a second line; ``best``: shown in bold; ``tip``: shown when it is pointed at; ``href``: ``#anchor`` of
    the page, a file beside it, or a page of MLflow; ``value``: what its column is sorted by, None: its text.
    """

    text: str
    small: str = ""
    best: bool = False
    tip: str = ""
    href: str = ""
    value: float | None = None


@dataclass
class Table:
    """The first cell of a row names it. ``anchors``: the ids of rows that others link to, as many as rows, or none.

    ``folded``: only its caption is shown until it is opened.
    """

    caption: str
    head: list[Column]
    rows: list[list[TableCell]]
    file: str | None = None
    anchors: list[str] = field(default_factory=list)
    folded: bool = False

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(group, how many neighbouring columns it has), in order; empty where no column has one."""
        spans: list[tuple[str, int]] = []
        for column in self.head:
            if spans and column.group and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(group for group, _ in spans) else []


@dataclass
class Picture:
    """A figure, and the files that hold it: ``source`` is a data URI, or ``drawing`` SVG that stands in the page."""

    caption: str
    alt: str
    files: list[str]
    source: str = ""
    drawing: Markup | None = None


@dataclass
class Section:
    """A part of the page.

    ``key``: its anchor and the stem of its files; ``found``: sentences, the most telling first, of which the page's
    first screen takes some; ``artefact``: what of the paper it is; ``facts``: (what was used, the paper's, here).
    """

    key: str
    title: str
    artefact: Artefact | None = None
    found: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str, str]] = field(default_factory=list)


def fixed(value: float | None) -> str:
    """A score: three decimals; empty for what is not known."""
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}".replace("-", "\u2212")


def signed(value: float) -> str:
    """A difference of scores, with its sign; empty for what is not known."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\u2212") if math.isfinite(value) else ""  # + 0.0: no -0


def bracketed(mean: float, spread: float | None) -> str:
    """mean (s.d.), or the mean alone."""
    return f"{fixed(mean)} ({fixed(spread)})" if fixed(spread) else fixed(mean)


def between(low: float, high: float) -> str:
    """The bounds of an interval; empty where there is none."""
    return f"{fixed(low)} to {fixed(high)}" if fixed(low) and fixed(high) else ""


def signed_between(low: float, high: float) -> str:
    """The bounds of an interval of a difference; empty where there is none, as for a single seed or slide."""
    return f"{signed(low)} to {signed(high)}" if signed(low) and signed(high) else ""


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
