"""Sections of the report's page; what they show is written as CSV, PNG and SVG beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from lemon.probe.figures import cost_figure, cost_points, save_figure
from lemon.probe.folds import PAPER
from lemon.probe.score import POOLED
from lemon.probe.tables import as_csv, encoder_labels, main_cells, paired_differences, table1_records
from lemon.report import figures
from lemon.report.blocks import (
    Picture,
    Section,
    Table,
    TableCell,
    between,
    bracketed,
    fixed,
    listed,
    plural,
    printed,
    signed,
    signed_interval,
    span,
)
from lemon.report.paper import ARTEFACTS, UNKNOWN, Artefact, PaperNumbers
from lemon.report.sources import OutputTable, TrackedRun
from lemon.runtime.store import Store
from lemon.runtime.tracking import metric_history
from lemon.schema import ScoreRow, SweepRow
from lemon.sweep import studies

Runs = Mapping[str, TrackedRun]

STUDIES = {
    "augmentation": "table2",
    "ssl": "table5",
    "size": "figure3_size",
    "slides": "figure3_slides",
    "organs": "figure3_organs",
}
"""Study -> what it is in the paper."""

NUCLS_NOTE = (
    "NuCLS comes from patients of TCGA-BRCA. Where pretraining is on TCGA, leave them out (exclude_benchmarks=nucls): "
    "no trial here did."
)

Columns = list[tuple[str, str]]


# --- probes -----------------------------------------------------------------------------------------------------------


def table1_section(probe: OutputTable[ScoreRow], numbers: PaperNumbers, store: Store, *, stem: str) -> Section:
    """Encoders x tasks, with differences between encoders."""
    cells, labels = main_cells(probe.rows), encoder_labels(probe.rows)
    columns = list(dict.fromkeys(key[1:] for key in sorted(cells)))
    best = {column: max(cell.mean for key, cell in cells.items() if key[1:] == column) for column in columns}
    rows = []
    for encoder in sorted({key[0] for key in cells}):
        line = [TableCell(labels[encoder])]
        for task, protocol in columns:
            cell = cells.get((encoder, task, protocol))
            if cell is None:
                line.append(TableCell(""))
                continue
            paper = (
                numbers.find("table1", row=[labels[encoder]], column=task)
                if _is_papers(protocol, task, columns)
                else None
            )
            text = bracketed(cell.mean, cell.spread)
            is_best = cell.mean == best[task, protocol]
            line.append(TableCell(text, between(cell.low, cell.high), is_best, printed(paper)))
        rows.append(line)
    caption = (
        "Mean (s.d.) over folds of the linear probe: balanced accuracy of classes, Pearson correlation of measures. "
        "Bold: the best of a column. Small: 95 % interval of the pooled score, from a bootstrap of whole slides."
    )
    section = Section(stem, "Table 1: encoders", ARTEFACTS["table1"])
    section.facts = facts_of(ARTEFACTS["table1"], probe_facts(probe))
    section.tables = [Table(caption, [("encoder", ""), *columns], rows, f"{stem}.csv")]
    _write_csv(store, f"{stem}.csv", table1_records(probe.rows))
    section.tables += _encoder_differences(probe, store, labels, file=f"{stem}_differences.csv")
    section.tables += left_table("table1", numbers)
    return section


def probe_facts(probe: OutputTable[ScoreRow]) -> dict[str, str]:
    """What an output of probes was made with, in the words of ``paper.RECIPE``."""
    counts: dict[str, int] = {}
    for row in probe.rows:
        if row.fold == POOLED and row.n:
            counts[row.task] = max(counts.get(row.task, 0), row.n)
    return {
        "Encoders": listed(encoder_labels(probe.rows).values()),
        "Score": listed(f"{task} ({count:,} nuclei)" for task, count in counts.items()),
    }


def _encoder_differences(
    probe: OutputTable[ScoreRow], store: Store, labels: Mapping[str, str], *, file: str
) -> list[Table]:
    differences = list(paired_differences(probe.store, labels))
    if not differences:
        return []
    _write_csv(store, file, [each._asdict() for each in differences])
    caption = (
        "Differences of pooled balanced accuracy between encoders, with 95 % intervals over the same draws of slides."
    )
    head = [("encoder", ""), ("against", ""), ("task", ""), ("splits", ""), ("difference", "")]
    rows = [
        [
            *map(TableCell, (each.encoder, each.against, each.task, each.protocol)),
            TableCell(signed(each.difference), f"{signed(each.low)} to {signed(each.high)}"),
        ]
        for each in differences
    ]
    return [Table(caption, head, rows, file)]


def figure2_section(probe: OutputTable[ScoreRow], numbers: PaperNumbers, store: Store, *, stem: str) -> Section:
    """Accuracy against arithmetic."""
    artefact = ARTEFACTS["figure2"]
    section = Section(stem, "Figure 2: accuracy against arithmetic", artefact)
    section.facts = facts_of(artefact, probe_facts(probe))
    points = cost_points(probe.store)
    if not points:
        section.notes.append(f"{probe.store.uri} holds no scores by splits without leaks, or no costs of its encoders.")
        return section
    caption = "Linear probe by splits without leaks (s.d. over folds) against GFLOP a cell, a multiply-add being two."
    alt = "A panel for each task: one point an encoder, score against arithmetic; the numbers are in the table below."
    section.pictures = [picture(cost_figure(points), store, stem, caption=caption, alt=alt)]
    _write_csv(store, f"{stem}.csv", [point._asdict() for point in points])
    head = [("encoder", ""), ("task", ""), ("GFLOP", "all arithmetic"), ("GMAC", "the paper's FLOPs"), ("score", "")]
    rows = [
        [
            *map(TableCell, (point.encoder, point.task, f"{point.gflop:.3g}", f"{point.paper_gmac:.3g}")),
            TableCell(
                bracketed(point.mean, point.spread),
                paper=printed(numbers.find("figure2", row=[point.encoder], column=point.task)),
            ),
        ]
        for point in points
    ]
    section.tables = [Table("What the figure shows.", head, rows, f"{stem}.csv"), *left_table("figure2", numbers)]
    return section


# --- sweeps -----------------------------------------------------------------------------------------------------------


def study_section(
    sweep: OutputTable[SweepRow], numbers: PaperNumbers, runs: Runs, store: Store, *, stem: str
) -> Section:
    """A study: its points over seeds, differences to its first point, its figure, its curves, what was lost."""
    study = sweep.rows[0].study
    artefact = ARTEFACTS.get(STUDIES.get(study, ""))
    values = studies.study_values(sweep.rows)
    title = f"Study: {study}" if artefact is None else artefact.name + (f": {study}" if "table" in artefact.key else "")
    section = Section(stem, title, artefact)
    facts = sweep_facts(sweep, values, runs)
    section.facts = facts_of(artefact, facts)
    left_out, on_nucls = facts.get("Patients left out", ""), any(value.task.startswith("nucls") for value in values)
    if on_nucls and left_out and not ("nucls" in left_out or "exclude_patients" in left_out):
        section.notes.append(NUCLS_NOTE)
    if values:
        section.pictures += study_figures(study, values, store, stem=stem)
        section.tables += [study_table(sweep, values, numbers, artefact, store, stem=stem)]
        section.tables += difference_tables(values, store, stem=stem)
    section.tables += _lost_table(sweep, store, stem=stem)
    section.tables += left_table(artefact.key, numbers) if artefact else []
    section.pictures += curves_pictures(sweep, runs, store, stem=stem)
    if not any(row.run_id in runs for row in sweep.rows):
        section.notes.append("Its runs are not in this MLflow, so settings and curves are not known.")
    return section


def study_table(
    sweep: OutputTable[SweepRow],
    values: Sequence[studies.Value],
    numbers: PaperNumbers,
    artefact: Artefact | None,
    store: Store,
    *,
    stem: str,
) -> Table:
    """Points x (task, protocol): mean (s.d.) over seeds, the best in bold."""
    by_cell = {(value.point, value.column): value for value in values}
    columns: Columns = list(dict.fromkeys(value.column for value in values))
    best = studies.best_points(values)
    is_scale = bool(artefact and artefact.key.startswith("figure3"))
    rows = []
    for point in studies.point_names(sweep.rows):
        point_values = [value for value in values if value.point == point]
        line = [TableCell(point, point_values[0].value if point_values and point_values[0].value != point else "")]
        line += [TableCell(plural(max((value.over.n for value in point_values), default=0), "seed"))]
        if is_scale:
            counts = ("n_cells", "n_slides", "n_organs")
            line += [TableCell(span(getattr(value, name) or None for value in point_values)) for name in counts]
        for column in columns:
            value = by_cell.get((point, column))
            if value is None:
                line.append(TableCell("", "no result"))
                continue
            paper = None
            if artefact and _is_papers(column[1], column[0], columns):
                paper = numbers.find(artefact.key, row=[point, value.value], column=column[0])
            line.append(
                _study_cell(
                    value, best=best[column], most=max(each.over.n for each in point_values), paper=printed(paper)
                )
            )
        rows.append(line)
    _write_csv(store, f"{stem}.csv", studies.value_records(values))
    caption = (
        "Linear probe, mean (s.d.) over seeds of training; each seed's score is the mean over folds. Bold: the best of "
        "a column. Small: 95 % t interval over seeds; for a single seed, which has none, the s.d. over folds."
    )
    scale: Columns = [("cells", ""), ("slides", ""), ("organs", "")] if is_scale else []
    return Table(caption, [("point", ""), ("seeds", ""), *scale, *columns], rows, f"{stem}.csv")


def _study_cell(value: studies.Value, *, best: float, most: int, paper: str) -> TableCell:
    over = value.over
    small = (
        between(over.low, over.high) if over.n > 1 else f"one seed; s.d. over folds {fixed(value.fold_spread) or '-'}"
    )
    if 1 < over.n < most:
        small += f" ({over.n} seeds)"
    return TableCell(bracketed(over.mean, over.sd), small, over.mean == best, paper)


def difference_tables(values: Sequence[studies.Value], store: Store, *, stem: str) -> list[Table]:
    """Each point less the first one, paired by seed."""
    differences = studies.differences_to_first(values)
    if not differences:
        return []
    _write_csv(store, f"{stem}_differences.csv", studies.difference_records(differences))
    columns: Columns = list(dict.fromkeys((each.task, each.protocol) for each in differences))
    by_place = {(each.point, each.task, each.protocol): each for each in differences}
    rows = []
    for point in dict.fromkeys(each.point for each in differences):
        line = [TableCell(point)]
        for task, protocol in columns:
            each = by_place.get((point, task, protocol))
            if each is None:
                line.append(TableCell("", "no seed in common"))
                continue
            small = f"{signed_interval(each.over)} ({each.over.n} seeds)" if each.over.n > 1 else "one seed"
            line.append(TableCell(signed(each.over.mean), small))
        rows.append(line)
    against = listed(each.against for each in differences)
    caption = (
        f"Differences to {against} over the same seeds: mean, and 95 % t interval of the paired differences. An "
        "interval that holds 0 shows no difference beyond the chance of training. Each is for itself alone."
    )
    return [Table(caption, [("point", f"less {against}"), *columns], rows, f"{stem}_differences.csv")]


def study_figures(study: str, values: Sequence[studies.Value], store: Store, *, stem: str) -> list[Picture]:
    """Figure 3 of a study that has one."""
    if study not in (*figures.AXES, "organs"):
        return []
    single = all(value.over.n < 2 for value in values)
    bars = (
        "One seed, so there are no error bars." if single else "Bars: standard error over seeds; none at a single seed."
    )
    if study == "organs":
        figure, axis = figures.organs_figure(values), "the number of organs, a line for each number of slides"
    else:
        figure, axis = (
            figures.scaling_figure(study, values),
            f"the number of {figures.AXES[study][0]}, a line for each task",
        )
    alt = f"Score against {axis}; the numbers are in the table below."
    caption = f"Linear probe against {axis}; by splits without leaks where a task has them. {bars}"
    return [picture(figure, store, stem, caption=caption, alt=alt)]


def sweep_facts(sweep: OutputTable[SweepRow], values: Sequence[studies.Value], runs: Runs) -> dict[str, str]:
    """What a sweep was made with, in the words of ``paper.RECIPE``: from its rows and the runs of its trials."""
    run_ids = [run for run_id in dict.fromkeys(row.run_id for row in sweep.rows) if (run := runs.get(run_id or ""))]
    settings = [run.settings for run in run_ids if run.settings is not None]
    known = {
        "Cells": span(value.n_cells for value in values),
        "Slides": span(value.n_slides for value in values),
        "Organs": span(value.n_organs or None for value in values),  # 0: none is known
        "Encoder": listed(f"{each.encoder} (width {each.width}, {plural(each.blocks, 'block')})" for each in settings),
        "Method": listed(each.method for each in settings),
        "Images seen": span(each.images_seen for each in settings),
        "Batch": span(each.batch for each in settings),
        "Seeds": listed(str(row.seed) for row in sweep.rows),
        "Score": listed(f"{value.task} ({value.metric.replace('_', ' ')})" for value in values),
        "Patients left out": listed(each.patients_left_out for each in settings),
    }
    return {name: text for name, text in known.items() if text}


def curves_pictures(sweep: OutputTable[SweepRow], runs: Runs, store: Store, *, stem: str) -> list[Picture]:
    """The loss by step of every trial that is in MLflow."""
    trials = {row.run_id: row for row in sweep.rows if row.run_id is not None and row.run_id in runs}
    histories = {run_id: metric_history(runs[run_id].run, "loss") for run_id in trials}
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for run_id, history in histories.items():
        if history:
            curves.setdefault(trials[run_id].point, []).append(history)
    if not curves:
        return []
    records = [
        {"trial": trials[run_id].trial, "step": step, "loss": loss}
        for run_id, history in histories.items()
        for step, loss in history
    ]
    _write_csv(store, f"{stem}_curves.csv", records)
    caption = "Loss of pretraining by step, a line a trial. Losses of different methods or views do not compare."
    alt = "A line for each trial, in the colour of its point: the loss of pretraining by step."
    return [picture(figures.curves_figure(curves), store, f"{stem}_curves", caption=caption, alt=alt)]


def _lost_table(sweep: OutputTable[SweepRow], store: Store, *, stem: str) -> list[Table]:
    lost = studies.missing_results(sweep.rows)
    if not lost:
        return []
    _write_csv(store, f"{stem}_lost.csv", [each._asdict() for each in lost])
    rows = [list(map(TableCell, each)) for each in lost]
    head = [("trial", ""), ("status", ""), ("reason", "")]
    return [Table("Trials without a result.", head, rows, f"{stem}_lost.csv")]


# --- the paper and files ----------------------------------------------------------------------------------------------


def left_table(artefact: str, numbers: PaperNumbers) -> list[Table]:
    """The paper's numbers that have no counterpart here."""
    left = numbers.left(artefact)
    caption = "Numbers of the paper, as given in paper=, that have no counterpart here."
    rows = [[TableCell(each.row), TableCell(each.column), TableCell("", paper=printed(each))] for each in left]
    return [Table(caption, [("row", ""), ("column", ""), ("score", "")], rows)] if left else []


def picture(figure: Figure, store: Store, stem: str, *, caption: str, alt: str) -> Picture:
    """Write a figure as PNG and SVG; the page holds the SVG."""
    files = save_figure(figure, store, stem)
    return Picture(caption, alt, data_uri(store.read_bytes(f"{stem}.svg"), "image/svg+xml"), files)


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as a source that needs no request."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def facts_of(artefact: Artefact | None, here: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(what, the paper's, here) of all that is known on either side."""
    paper = artefact.facts if artefact else {}
    return [(name, paper.get(name, UNKNOWN), here.get(name, "not known")) for name in dict.fromkeys([*paper, *here])]


def _is_papers(protocol: str, task: str, columns: Iterable[tuple[str, str]]) -> bool:
    """Whether the paper's number belongs in a column: that of its splits, or of others where a task has only those."""
    return protocol == PAPER or (task, PAPER) not in columns


def _write_csv(store: Store, name: str, records: Sequence[dict[str, Any]]) -> None:
    store.write_bytes(name, as_csv(records).encode())
