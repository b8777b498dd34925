"""Sections on scored encoders: Table 1 and Figure 2; what they show is written as CSV, PNG and SVG beside the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lemon.probe.figures import CostMean, CostPoint, cost_figures, cost_means, cost_points, left_out_of_means
from lemon.probe.folds import LEAK_FREE, PAPER
from lemon.probe.score import OVER_FOLDS
from lemon.probe.tables import (
    PairedDifference,
    ScoreCell,
    encoder_labels,
    leading_encoders,
    main_cells,
    paired_differences,
    table1_records,
    task_labels,
    untrained_twins,
)
from lemon.report.beside_paper import Key, Line, facts_of, is_papers, left_table, metric_names, score_grid
from lemon.report.blocks import (
    Column,
    Picture,
    Section,
    Table,
    TableCell,
    between,
    bracketed,
    listed,
    signed,
    signed_between,
)
from lemon.report.files import picture, write_csv
from lemon.report.intervals import ScoreLine, scores_figure
from lemon.report.paper import ARTEFACTS, PaperNumbers
from lemon.report.provenance import anchor
from lemon.report.sentences import probe_sentences
from lemon.report.sources import OutputTable, Report, stems
from lemon.runtime.store import Store
from lemon.schema import ScoreRow

SPLITS = {LEAK_FREE: "Splits that divide no slide, patient or hospital", PAPER: "The paper's splits"}

CELLS_ARE = "mean (s.d.) over folds of the linear probe, and the 95 % interval of the mean over draws of whole slides."


@dataclass(frozen=True)
class _Scored:
    """What an output of probes says, by stem of the encoder: labels, cells by (task, protocol), where it leads."""

    probe: OutputTable[ScoreRow]
    labels: dict[str, str]
    cells: dict[str, dict[Key, ScoreCell]]
    lead: dict[str, set[Key]]
    differences: list[PairedDifference]
    twins: dict[str, str]

    @classmethod
    def of(cls, probe: OutputTable[ScoreRow]) -> _Scored:
        differences, labels = paired_differences(probe.store, probe.rows), encoder_labels(probe.rows)
        cells: dict[str, dict[Key, ScoreCell]] = {}
        for (stem, task, protocol), cell in main_cells(probe.rows).items():
            cells.setdefault(stem, {})[task, protocol] = cell
        leaders = leading_encoders(probe.rows, differences)
        lead = {stem: {key for key, those in leaders.items() if labels[stem] in those} for stem in cells}
        return cls(probe, labels, cells, lead, differences, untrained_twins(probe.store, probe.rows))

    @property
    def keys(self) -> list[Key]:
        """Every task and protocol."""
        return sorted({key for cells in self.cells.values() for key in cells})

    @property
    def in_order(self) -> list[str]:
        """The highest first, by the mean over what each was scored on; untrained twins follow theirs."""
        stem_of = {label: stem for stem, label in self.labels.items()}
        mean = {stem: float(np.mean([cell.mean for cell in cells.values()])) for stem, cells in self.cells.items()}
        trained = [stem for stem in self.cells if not self.is_untrained(stem)]
        ranked = sorted(trained, key=lambda stem: (-mean[stem], self.labels[stem]))
        pairs = ((stem, stem_of.get(self.twins.get(self.labels[stem], ""))) for stem in ranked)
        return list(dict.fromkeys(stem for pair in pairs for stem in pair if stem))

    def is_untrained(self, stem: str) -> bool:
        """Whether it is there as another's untrained twin."""
        return self.labels[stem] in self.twins.values()

    def href(self, stem: str) -> str:
        """Its row of the table of where numbers come from."""
        return f"#{anchor(self.probe.store.uri, stem)}"


def encoder_sections(report: Report) -> Iterator[Section]:
    """Encoders x tasks: Table 1, with a figure of the intervals and differences between encoders."""
    artefact = ARTEFACTS["table1"]
    for stem, which, probe in stems("table1", report.sources.probes):
        scored = _Scored.of(probe)
        section = Section(stem, f"Table 1: encoders{which}", artefact, facts=facts_of(artefact, probe_facts(probe)))
        section.found = list(probe_sentences(probe.rows, scored.differences, scored.twins))
        section.pictures = [_scores_picture(scored, report.store, stem=stem)]
        section.tables = [
            *_score_tables(scored, report.numbers, stem=stem),
            *_encoder_differences(scored.differences, report.store, file=f"{stem}_differences.csv"),
            *left_table(artefact, report.numbers),
        ]
        section.notes = report.numbers.notes(artefact.key)
        write_csv(report.store, f"{stem}.csv", table1_records(probe.rows))
        yield section


def _score_tables(scored: _Scored, numbers: PaperNumbers, *, stem: str) -> Iterator[Table]:
    """A table for each kind of splits, those without leaks first."""
    lines = []
    for encoder in scored.in_order:
        label = scored.labels[encoder]
        first = TableCell(label, "untrained" if scored.is_untrained(encoder) else "", href=scored.href(encoder))
        cells = {
            key: TableCell(
                bracketed(cell.mean, cell.spread),
                between(cell.low, cell.high),
                best=key in scored.lead[encoder],
                value=cell.mean,
            )
            for key, cell in scored.cells[encoder].items()
        }
        lines.append(Line([first], [label], cells))
    for protocol in sorted({protocol for _, protocol in scored.keys}, key=lambda name: (name != LEAK_FREE, name)):
        keys = [key for key in scored.keys if key[1] == protocol]
        head, body = score_grid(
            [line for line in lines if line.cells.keys() & {*keys}],
            keys,
            first=[Column("encoder")],
            numbers=numbers,
            artefact=ARTEFACTS["table1"],
            papers={key: "" if protocol == PAPER else "other splits" for key in keys if is_papers(key, scored.keys)},
            metrics=metric_names(scored.probe.rows),
        )
        yield Table(f"{SPLITS.get(protocol, protocol)}: {CELLS_ARE}", head, body, f"{stem}.csv")


def _scores_picture(scored: _Scored, store: Store, *, stem: str) -> Picture:
    """Every score with its interval, by splits without leaks where a task has them."""
    protocols = dict(sorted(scored.keys, key=lambda key: (key[1] == LEAK_FREE, key)))
    lines = [
        ScoreLine(
            scored.labels[encoder],
            {key[0]: cell for key, cell in scored.cells[encoder].items() if key in protocols.items()},
            untrained=scored.is_untrained(encoder),
            leads={key[0] for key in scored.lead[encoder] if key in protocols.items()},
            href=scored.href(encoder),
        )
        for encoder in scored.in_order
    ]
    figure = scores_figure(lines, tasks=task_labels(sorted(protocols)), metrics=metric_names(scored.probe.rows))
    caption = (
        "Mean over folds with its 95 % interval over draws of slides. Filled: the best with all that it cannot be told "
        "apart from. Grey: untrained."
    )
    alt = "A panel for each task, a line for each encoder: its score with its interval; the numbers are in the table."
    return picture(figure, store, f"{stem}_scores", caption=caption, alt=alt)


def probe_facts(probe: OutputTable[ScoreRow]) -> dict[str, str]:
    """What an output of probes was made with, in the words of ``paper.RECIPE``."""
    counts: dict[str, int] = {}
    for row in probe.rows:
        if row.fold == OVER_FOLDS and row.n:
            counts[row.task] = max(counts.get(row.task, 0), row.n)
    return {
        "Encoders": listed(encoder_labels(probe.rows).values()),
        "Score": listed(f"{task} ({count:,} nuclei)" for task, count in counts.items()),
    }


def _encoder_differences(differences: Sequence[PairedDifference], store: Store, *, file: str) -> list[Table]:
    if not differences:
        return []
    write_csv(store, file, [each._asdict() for each in differences])
    names = task_labels(each.task for each in differences)
    rows = [
        [
            *(TableCell(each.encoder), TableCell(each.against)),
            *(TableCell(names[each.task], tip=each.task), TableCell(each.protocol)),
            TableCell(signed(each.difference), signed_between(each.low, each.high), value=each.difference),
            TableCell("may be chance" if each.may_be_chance else "beyond chance"),
        ]
        for each in differences
    ]
    head = [*map(Column, ("encoder", "less", "task", "splits")), Column("difference", "95 % interval"), Column("")]
    caption = f"Differences between encoders, over the same draws of slides ({len(rows)})."
    return [Table(caption, head, rows, file, folded=True)]


def cost_sections(report: Report) -> Iterator[Section]:
    """Accuracy against arithmetic: Figure 2."""
    artefact = ARTEFACTS["figure2"]
    for stem, which, probe in stems("figure2", report.sources.probes):
        if points := cost_points(probe.store):
            means = cost_means(points)
            title = f"Figure 2: accuracy against arithmetic{which}"
            section = Section(stem, title, artefact, facts=facts_of(artefact, probe_facts(probe)))
            section.pictures = _cost_pictures(probe, points, means, report.store, stem=stem)
            section.tables = [_cost_table(points, report.store, stem=stem)]
            section.notes = left_out_of_means(points, means)
            if means:
                write_csv(report.store, f"{stem}_means.csv", [mean._asdict() for mean in means])
            yield section


def _cost_pictures(
    probe: OutputTable[ScoreRow],
    points: Sequence[CostPoint],
    means: Sequence[CostMean],
    store: Store,
    *,
    stem: str,
) -> list[Picture]:
    """The paper's panels, where one of its tasks was scored, and a panel a task; points lead to their origin."""
    links = {label: f"#{anchor(probe.store.uri, encoder)}" for encoder, label in encoder_labels(probe.rows).items()}
    captions = {
        "figure2": "Mean over a panel's tasks against GFLOP a cell, a multiply-add being two. Size: parameters.",
        "figure2_tasks": "Each task by itself, with the s.d. over folds.",
    }
    alt = "One point an encoder, score against arithmetic; the numbers are in the table."
    return [
        picture(
            figure,
            store,
            stem + name.removeprefix("figure2"),
            caption=f"{captions[name if means else 'figure2_tasks']} Linear probe by splits without leaks.",
            alt=alt,
        )
        for name, figure in cost_figures(points, links=links).items()
    ]


def _cost_table(points: Sequence[CostPoint], store: Store, *, stem: str) -> Table:
    write_csv(store, f"{stem}.csv", [point._asdict() for point in points])
    names = task_labels(point.task for point in points)
    head = [Column("encoder"), Column("task"), Column("GFLOP", "all arithmetic")]
    head += [Column("GMAC", "the paper's FLOPs"), Column("score")]
    rows = [
        [
            *(TableCell(point.encoder), TableCell(names[point.task], tip=point.task)),
            *(TableCell(f"{cost:.3g}", value=cost) for cost in (point.gflop, point.paper_gmac)),
            TableCell(bracketed(point.mean, point.spread), value=point.mean),
        ]
        for point in points
    ]
    return Table(f"What the figure shows ({len(rows)}).", head, rows, f"{stem}.csv", folded=True)
