"""Sections on sweeps: Tables 2 and 5, Figure 3, one's own studies; written as CSV, PNG and SVG beside the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lemon.probe.folds import PAPER
from lemon.probe.tables import task_labels
from lemon.report import figures
from lemon.report.beside_paper import Line, facts_of, is_papers, left_table, metric_names, score_grid
from lemon.report.blocks import (
    Column,
    Picture,
    Section,
    Table,
    TableCell,
    between,
    bracketed,
    fixed,
    listed,
    plural,
    signed,
    signed_between,
    span,
)
from lemon.report.files import picture, write_csv
from lemon.report.paper import ARTEFACTS, Artefact
from lemon.report.provenance import anchor
from lemon.report.sentences import study_sentences
from lemon.report.sources import OutputTable, Report, TrackedRun, stems
from lemon.runtime.store import Store
from lemon.runtime.tracking import metric_history
from lemon.schema import SweepRow
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

PAPERS_IMAGES = 150_000_000
"""Images that an encoder of the paper has seen: trainings of fewer do not compare with its."""


def study_sections(report: Report) -> Iterator[Section]:
    """The paper's studies in its order, then studies of one's own."""
    by_study: dict[str, list[OutputTable[SweepRow]]] = {}
    for sweep in report.sources.sweeps:
        by_study.setdefault(sweep.rows[0].study, []).append(sweep)
    papers = {study: key for study, key in STUDIES.items() if study in by_study}
    others = [study for study in by_study if study not in STUDIES]
    own = {study: f"study{number}" for number, study in enumerate(others, 1)}
    for study, key in {**papers, **own}.items():
        for stem, which, sweep in stems(key, by_study[study]):
            yield _study_section(sweep, report, stem=stem, which=which)


def _study_section(sweep: OutputTable[SweepRow], report: Report, *, stem: str, which: str) -> Section:
    """A study: its points over seeds, differences to its first point, its figure, its curves, what was lost."""
    store, runs, study = report.store, report.sources.runs, sweep.rows[0].study
    artefact = ARTEFACTS.get(STUDIES.get(study, ""))
    values = studies.study_values(sweep.rows)
    title = f"Study: {study}" if artefact is None else artefact.name + (f": {study}" if "table" in artefact.key else "")
    facts = sweep_facts(sweep, values, runs)
    section = Section(stem, title + which, artefact, facts=facts_of(artefact, facts))
    section.found = list(study_sentences(sweep))
    left_out, on_nucls = facts.get("Patients left out", ""), any(value.task.startswith("nucls") for value in values)
    if on_nucls and left_out and not ("nucls" in left_out or "exclude_patients" in left_out):
        section.notes.append(NUCLS_NOTE)
    if values:
        section.pictures += study_figures(sweep, values, store, stem=stem)
        section.tables += [study_table(sweep, values, report, artefact, stem=stem)]
        section.tables += difference_tables(values, store, stem=stem)
    section.tables += _lost_table(sweep, store, stem=stem)
    if artefact:
        section.notes += report.numbers.notes(artefact.key)
        section.tables += left_table(artefact, report.numbers)
    section.pictures += curves_pictures(sweep, runs, store, stem=stem)
    if not any(row.run_id in runs for row in sweep.rows):
        section.notes.append("Its runs are not in this MLflow, so settings and curves are not known.")
    return section


def study_table(
    sweep: OutputTable[SweepRow],
    values: Sequence[studies.Value],
    report: Report,
    artefact: Artefact | None,
    *,
    stem: str,
) -> Table:
    """Points x (task, protocol): mean (s.d.) over seeds, those that lead in bold."""
    lead = studies.leading_points(values)
    is_scale = bool(artefact and artefact.key.startswith("figure3"))
    lines = []
    for point in studies.point_names(sweep.rows):
        own = [value for value in values if value.point == point]
        most = max((value.over.n for value in own), default=0)
        name = own[0].value if own else point
        first = [TableCell(point, name if name != point else ""), TableCell(plural(most, "seed"), value=most)]
        for count in ("n_cells", "n_slides", "n_organs") if is_scale else ():
            known = [getattr(value, count) for value in own if getattr(value, count)]
            first.append(TableCell(span(known), value=max(known, default=None)))
        cells = {value.column: _study_cell(value, best=point in lead[value.column], most=most) for value in own}
        lines.append(Line(first, [point, name], cells))
    keys = list(dict.fromkeys(value.column for value in values))
    unlike = "" if _is_papers_scale(sweep, report.sources.runs) else "other training"
    head, rows = score_grid(
        lines,
        keys,
        first=[*map(Column, ("point", "seeds", *(("cells", "slides", "organs") if is_scale else ())))],
        numbers=report.numbers,
        artefact=artefact,
        papers={key: unlike or ("" if key[1] == PAPER else "other splits") for key in keys if is_papers(key, keys)},
        metrics=metric_names(values),
    )
    write_csv(report.store, f"{stem}.csv", studies.value_records(values))
    caption = (
        "Linear probe, mean (s.d.) over seeds of training; each seed's score is the mean over folds. Small: 95 % t "
        "interval over seeds; for a single seed, which has none, the s.d. over folds."
    )
    return Table(caption, head, rows, f"{stem}.csv")


def _is_papers_scale(sweep: OutputTable[SweepRow], runs: Runs) -> bool:
    """Whether every trial has seen as many images as the paper's encoders."""
    settings = [run.settings for row in sweep.rows if (run := runs.get(row.run_id or "")) is not None]
    return bool(settings) and all(each is not None and each.images_seen >= PAPERS_IMAGES for each in settings)


def _study_cell(value: studies.Value, *, best: bool, most: int) -> TableCell:
    over = value.over
    small = (
        between(over.low, over.high) if over.n > 1 else f"one seed; s.d. over folds {fixed(value.fold_spread) or '-'}"
    )
    if 1 < over.n < most:
        small += f" ({over.n} seeds)"
    return TableCell(bracketed(over.mean, over.sd), small, best=best, value=over.mean)


def difference_tables(values: Sequence[studies.Value], store: Store, *, stem: str) -> list[Table]:
    """Each point less the first one, paired by seed."""
    differences = studies.differences_to_first(values)
    if not differences:
        return []
    write_csv(store, f"{stem}_differences.csv", studies.difference_records(differences))
    keys = list(dict.fromkeys((each.task, each.protocol) for each in differences))
    names = task_labels(task for task, _ in keys)
    by_place = {(each.point, each.task, each.protocol): each for each in differences}
    rows = []
    for point in dict.fromkeys(each.point for each in differences):
        line = [TableCell(point)]
        for key in keys:
            each = by_place.get((point, *key))
            if each is None:
                line.append(TableCell("", "no seed in common"))
                continue
            over = each.over
            small = f"{signed_between(over.low, over.high)} ({over.n} seeds)" if over.n > 1 else "one seed"
            line.append(TableCell(signed(over.mean), small, value=over.mean))
        rows.append(line)
    against = listed(each.against for each in differences)
    caption = (
        f"Differences to {against} over the same seeds: mean, and 95 % t interval of the paired differences. An "
        "interval that holds 0 shows no difference beyond the chance of training."
    )
    head = [Column("point", f"less {against}"), *(Column(names[task], protocol, tip=task) for task, protocol in keys)]
    return [Table(caption, head, rows, f"{stem}_differences.csv", folded=True)]


def study_figures(
    sweep: OutputTable[SweepRow], values: Sequence[studies.Value], store: Store, *, stem: str
) -> list[Picture]:
    """Figure 3 of a study that has one; a point leads to its first trial."""
    study = sweep.rows[0].study
    if study not in figures.AXES:
        return []
    single = all(value.over.n < 2 for value in values)
    bars = (
        "One seed, so there are no error bars." if single else "Bars: standard error over seeds; none at a single seed."
    )
    axis = f"the number of {figures.AXES[study][0]}"
    lines = "a line for each encoder" + (" and number of slides" if study == "organs" else "")
    links = {row.point: f"#{anchor(sweep.store.uri, row.trial)}" for row in reversed(sweep.rows)}
    pictures = []
    for end, figure in figures.scaling_figures(study, values, links=links).items():
        what = "each task by itself" if end else "mean over the tasks"
        caption = f"Linear probe against {axis}, {what}, {lines}; by splits without leaks where a task has them. {bars}"
        alt = f"Score against {axis}, {lines}; the numbers are in the table."
        pictures.append(picture(figure, store, stem + end, caption=caption, alt=alt))
    return pictures


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
    write_csv(store, f"{stem}_curves.csv", records)
    caption = "Loss of pretraining by step, a line a trial. Losses of different methods or views do not compare."
    alt = "A line for each trial, in the colour of its point: the loss of pretraining by step."
    return [picture(figures.curves_figure(curves), store, f"{stem}_curves", caption=caption, alt=alt)]


def _lost_table(sweep: OutputTable[SweepRow], store: Store, *, stem: str) -> list[Table]:
    lost = studies.missing_results(sweep.rows)
    if not lost:
        return []
    write_csv(store, f"{stem}_lost.csv", [each._asdict() for each in lost])
    rows = [list(map(TableCell, each)) for each in lost]
    head = [*map(Column, ("trial", "status", "reason"))]
    return [Table("Trials without a result.", head, rows, f"{stem}_lost.csv")]
