"""Section on robustness: the cards of scored encoders beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from lemon.probe.card import CardLine, beside, card_rows
from lemon.probe.card_figure import card_figure
from lemon.report.blocks import Column, Section, Table, TableCell, between, fixed
from lemon.report.files import picture, write_csv
from lemon.report.sources import Report, stems
from lemon.schema import RobustnessRow

CAPTION = (
    "Small: 95 % interval over slides. A site is a hospital, a scanner or a laboratory. Intervals that overlap widely "
    "differ by chance; nothing is marked as best."
)
PICTURE = "Every measure from its worst value on the left to its best on the right, with intervals; the tick is chance."


def robustness_sections(report: Report) -> Iterator[Section]:
    """What encoders hold of sites, stains and compression, for each output of probes that says anything of it."""
    for stem, which, probe in stems("robustness", report.sources.probes):
        rows = card_rows(probe.rows)
        if not rows:
            continue
        cards = beside(rows)
        section = Section(stem, f"Robustness to sites, stains and compression{which}")
        section.pictures = [picture(card_figure(rows), report.store, stem, caption=PICTURE, alt=PICTURE)]
        write_csv(report.store, f"{stem}.csv", [asdict(row) for row in rows])
        head = [Column("measure"), Column("on"), Column("chance"), *map(Column, cards.encoders)]
        section.tables = [Table(CAPTION, head, [_line(line) for line in cards.lines], f"{stem}.csv")]
        section.notes = [f"Not measured: {line}." for line in cards.missing]
        yield section


def _line(line: CardLine) -> list[TableCell]:
    known = [row for row in line.rows if row is not None]
    name = TableCell(line.measure.title, tip=line.measure.about)
    return [name, TableCell(line.task), TableCell(fixed(known[0].chance)), *map(_cell, line.rows)]


def _cell(row: RobustnessRow | None) -> TableCell:
    if row is None:
        return TableCell("")
    small = between(row.low, row.high) if row.low is not None and row.high is not None else ""
    return TableCell(fixed(row.value), small, value=row.value)
