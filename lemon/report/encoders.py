"""Sections on scored encoders: Table 1 and Figure 2; what they show is written as CSV, PNG and SVG beside the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lemon.probe.figures import CostPoint, cost_figure, cost_points
from lemon.probe.folds import LEAK_FREE, PAPER
from lemon.probe.score import OVER_FOLDS
from lemon.probe.tables import (
    PairedDifference,
    encoder_labels,
    leading_encoders,
    main_cells,
    paired_differences,
    table1_records,
    task_labels,
    untrained_twins,
)
from lemon.report.beside_paper import Line, facts_of, is_papers, left_table, metric_names, score_grid
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


def encoder_sections(report: Report) -> Iterator[Section]:
    """Encoders x tasks: Table 1, with a figure of the intervals and differences between encoders."""
    for stem, which, probe in stems("table1", report.sources.probes):
        yield _encoder_section(probe, report, stem=stem, title=f"Table 1: encoders{which}")


def _encoder_section(probe: OutputTable[ScoreRow], report: Report, *, stem: str, title: str) -> Section:
    artefact, store, rows = ARTEFACTS["table1"], report.store, probe.rows
    differences = paired_differences(probe.store, rows)
    twins = untrained_twins(probe.store, rows)
    section = Section(stem, title, artefact, facts=facts_of(artefact, probe_facts(probe)))
    section.found = list(probe_sentences(rows, differences, twins))
    section.pictures = [_scores_picture(probe, differences, twins, store, stem=stem)]
    write_csv(store, f"{stem}.csv", table1_records(rows))
    section.tables = [
        *_score_tables(probe, differences, twins, report.numbers, stem=stem),
        *_encoder_differences(differences, store, file=f"{stem}_differences.csv"),
        *left_table(artefact, report.numbers),
    ]
    return section


def _score_tables(
    probe: OutputTable[ScoreRow],
    differences: Sequence[PairedDifference],
    twins: Mapping[str, str],
    numbers: PaperNumbers,
    *,
    stem: str,
) -> Iterator[Table]:
    """A table for each kind of splits, those without leaks first."""
    cells, labels = main_cells(probe.rows), encoder_labels(probe.rows)
    lead = leading_encoders(probe.rows, differences)
    lines = []
    for encoder in _in_order(probe, twins):
        own = {key[1:]: cell for key, cell in cells.items() if key[0] == encoder}
        shown = {
            key: TableCell(
                bracketed(cell.mean, cell.spread),
                between(cell.low, cell.high),
                best=labels[encoder] in lead[key],
                value=cell.mean,
            )
            for key, cell in own.items()
        }
        label = labels[encoder]
        small = "untrained" if label in twins.values() else ""
        lines.append(Line([TableCell(label, small, href=f"#{anchor(probe.store.uri, encoder)}")], [label], shown))
    everywhere = sorted({key[1:] for key in cells})
    for protocol in sorted({protocol for _, protocol in everywhere}, key=lambda name: (name != LEAK_FREE, name)):
        keys = [key for key in everywhere if key[1] == protocol]
        head, body = score_grid(
            [line for line in lines if line.cells.keys() & {*keys}],
            keys,
            first=[Column("encoder")],
            numbers=numbers,
            artefact=ARTEFACTS["table1"],
            papers={key: "" if protocol == PAPER else "other splits" for key in keys if is_papers(key, everywhere)},
            metrics=metric_names(probe.rows),
        )
        yield Table(f"{SPLITS.get(protocol, protocol)}: {CELLS_ARE}", head, body, f"{stem}.csv")


def _in_order(probe: OutputTable[ScoreRow], twins: Mapping[str, str]) -> list[str]:
    """Stems of encoders, the highest first by the mean over what each was scored on; untrained twins follow theirs."""
    own: dict[str, list[float]] = {}
    for (stem, _, _), cell in main_cells(probe.rows).items():
        own.setdefault(stem, []).append(cell.mean)
    labels = encoder_labels(probe.rows)
    stems_of = {label: stem for stem, label in labels.items()}
    ranked = sorted(own, key=lambda stem: (-float(np.mean(own[stem])), labels[stem]))
    trained = [stem for stem in ranked if labels[stem] not in twins.values()]
    pairs = ((stem, stems_of.get(twins.get(labels[stem], ""))) for stem in trained)
    return list(dict.fromkeys(stem for pair in pairs for stem in pair if stem))


def _scores_picture(
    probe: OutputTable[ScoreRow],
    differences: Sequence[PairedDifference],
    twins: Mapping[str, str],
    store: Store,
    *,
    stem: str,
) -> Picture:
    """Every score with its interval, by splits without leaks where a task has them."""
    cells, labels = main_cells(probe.rows), encoder_labels(probe.rows)
    lead = leading_encoders(probe.rows, differences)
    keys = dict(sorted({key[1:] for key in cells}, key=lambda key: (key[1] == LEAK_FREE, key)))
    lines = [
        ScoreLine(
            labels[encoder],
            {task: cell for task, protocol in keys.items() if (cell := cells.get((encoder, task, protocol)))},
            untrained=labels[encoder] in twins.values(),
            leads={key[0] for key in keys.items() if labels[encoder] in lead[key]},
            href=f"#{anchor(probe.store.uri, encoder)}",
        )
        for encoder in _in_order(probe, twins)
    ]
    figure = scores_figure(lines, tasks=task_labels(sorted(keys)), metrics=metric_names(probe.rows))
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
    for stem, which, probe in stems("figure2", report.sources.probes):
        if points := cost_points(probe.store):
            artefact = ARTEFACTS["figure2"]
            section = Section(stem, f"Figure 2: accuracy against arithmetic{which}", artefact)
            text = "Linear probe by splits without leaks (s.d. over folds) against GFLOP a cell; a multiply-add is two."
            alt = "A panel for each task: one point an encoder, score against arithmetic; the numbers are in the table."
            section.pictures = [picture(cost_figure(points), report.store, stem, caption=text, alt=alt)]
            section.tables = [_cost_table(points, report.store, stem=stem)]
            section.facts = facts_of(artefact, probe_facts(probe))
            yield section


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
