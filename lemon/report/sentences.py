"""What was found, in sentences that are computed from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lemon.probe.folds import LEAK_FREE
from lemon.probe.tables import (
    PairedDifference,
    ScoreCell,
    encoder_labels,
    leading_encoders,
    main_cells,
    task_labels,
)
from lemon.report.blocks import bracketed, fixed, listed, plural, signed, signed_between
from lemon.report.figures import AXES
from lemon.report.sources import OutputTable
from lemon.schema import ScoreRow, SweepRow
from lemon.sweep import studies
from lemon.sweep.studies import Value

Twins = Mapping[str, str]
"""Label of a trained encoder -> that of an untrained one of the same shape."""


@dataclass(frozen=True)
class _Column:
    """Scores on a task by the splits that count: label of an encoder -> its cell; who leads."""

    task: str
    protocol: str
    cells: dict[str, ScoreCell]
    lead: set[str]


# --- encoders ---------------------------------------------------------------------------------------------------------


def probe_sentences(rows: Sequence[ScoreRow], differences: Sequence[PairedDifference], twins: Twins) -> Iterator[str]:
    """Who is best, and on how many tasks; what training gave each encoder; then each task for itself.

    By splits without leaks where a task has them.
    """
    pairs = {(each.task, each.protocol, each.encoder, each.against): each for each in differences}
    pairs |= {(each.task, each.protocol, each.against, each.encoder): each.turned() for each in differences}
    columns, names = _columns(rows, differences), task_labels(row.task for row in rows)
    if len(columns) > 1 and any(len(column.cells) > 1 for column in columns):
        yield _leads(columns, names)
    tasks = [_on_task(column, pairs, names) for column in columns]
    if len(tasks) == 1:
        yield tasks[0]
    for trained, untrained in twins.items():
        known = [
            pair for each in columns if (pair := pairs.get((each.task, each.protocol, trained, untrained))) is not None
        ]
        if known:
            yield _training(trained, known, names)
    if len(tasks) > 1:
        yield from tasks


def _leads(columns: Sequence[_Column], names: Mapping[str, str]) -> str:
    """Who is best beyond chance, and where."""
    by_leader: dict[str, list[str]] = {}
    for column in columns:
        if len(column.lead) == 1:
            by_leader.setdefault(next(iter(column.lead)), []).append(names[column.task])
    if not by_leader:
        return f"On none of {len(columns)} tasks is an encoder best beyond chance."
    ranked = sorted(by_leader.items(), key=lambda item: -len(item[1]))
    parts = [f"{label} is best on {len(tasks)} ({listed(tasks, most=3)})" for label, tasks in ranked]
    rest = len(columns) - sum(map(len, by_leader.values()))
    parts += [f"on {rest} the lead may be chance"] if rest else []
    return f"Of {len(columns)} tasks, {'; '.join(parts)}."


def _on_task(
    column: _Column, pairs: Mapping[tuple[str, str, str, str], PairedDifference], names: Mapping[str, str]
) -> str:
    """The best encoder of a task and the next, or those with which it shares the lead."""
    best, *others = sorted(column.cells, key=lambda label: -column.cells[label].mean)
    head = f"{names[column.task]} ({column.protocol}): {best} {_score(column.cells[best])}"
    if not others:
        return f"{head}, the only encoder."
    if column.lead == {best}:
        gap = pairs[column.task, column.protocol, best, others[0]]
        return f"{head} is best; next is {others[0]} {_score(column.cells[others[0]])}, a difference of {_apart(gap)}."
    shared = [label for label in others if not column.lead or label in column.lead]
    return f"{head} is highest, but its lead over {listed(shared, most=3)} may be chance."


def _columns(rows: Sequence[ScoreRow], differences: Sequence[PairedDifference]) -> list[_Column]:
    """A column a task: by splits without leaks, or those that it has."""
    labels, lead = encoder_labels(rows), leading_encoders(rows, differences)
    cells: dict[tuple[str, str], dict[str, ScoreCell]] = {}
    for (stem, task, protocol), cell in main_cells(rows).items():
        cells.setdefault((task, protocol), {})[labels[stem]] = cell
    chosen = {}
    for task, protocol in sorted(cells):
        if protocol == LEAK_FREE or task not in chosen:
            chosen[task] = _Column(task, protocol, cells[task, protocol], lead[task, protocol])
    return list(chosen.values())


def _training(trained: str, pairs: Sequence[PairedDifference], names: Mapping[str, str]) -> str:
    """What training gave an encoder over random weights; with numbers where it is beyond chance, or of one task."""
    parts = []
    for verdict, found in (
        ("better on", [pair for pair in pairs if pair.low > 0]),
        ("worse on", [pair for pair in pairs if pair.high < 0]),
    ):
        parts += [f"{verdict} {listed((f'{names[pair.task]}, {_apart(pair)}' for pair in found), most=3)}"] * bool(
            found
        )
    even = [pair for pair in pairs if pair.may_be_chance]
    if len(pairs) == len(even) == 1:
        parts.append(f"no difference beyond chance on {names[even[0].task]}, {_apart(even[0])}")
    elif even:
        parts.append(f"no difference beyond chance on {listed((names[pair.task] for pair in even), most=3)}")
    return f"{trained} against untrained weights of the same shape: {'; '.join(parts)}."


def _score(cell: ScoreCell) -> str:
    return bracketed(cell.mean, cell.spread)


def _apart(pair: PairedDifference) -> str:
    """A difference with its interval."""
    bounds = signed_between(pair.low, pair.high)
    return signed(pair.difference) + (f" (95 % interval {bounds})" if bounds else " (one slide, so no interval)")


# --- studies ----------------------------------------------------------------------------------------------------------


def study_sentences(sweep: OutputTable[SweepRow]) -> Iterator[str]:
    """One sentence or two a task: what a study's best point, or its largest, gains."""
    study = sweep.rows[0].study
    values = studies.study_values(sweep.rows)
    names, lead = task_labels(value.task for value in values), studies.leading_points(values)
    for task, task_values in studies.main_values(values).items():
        head, those = f"{study}, {names[task]} ({task_values[0].protocol}", lead[task_values[0].column]
        by_encoder: dict[str, list[Value]] = {}
        for value in task_values:
            by_encoder.setdefault(value.encoder, []).append(value)
        if study in AXES and len(by_encoder) > 1:
            yield from (f"{head}, {encoder}): {_verdict(study, own, those)}" for encoder, own in by_encoder.items())
        else:
            yield f"{head}): {_verdict(study, task_values, those)}"
    lost = {each.trial for each in studies.missing_results(sweep.rows)}
    if lost:
        yield f"{study}: {plural(len(lost), 'trial')} without a result, listed with the reason below."


def _verdict(study: str, values: Sequence[Value], lead: set[str]) -> str:
    if len(values) == 1:
        return f"{values[0].point} {fixed(values[0].over.mean)}, the only point with a result."
    return _scaled(values) if study in AXES else _compared(values, lead)


def _scaled(values: Sequence[Value]) -> str:
    """From the smallest point to the largest, and what the last step gives."""
    ordered = sorted(values, key=lambda value: (value.n_organs, value.n_slides, value.n_cells))
    first, *_, before, last = [ordered[0], *ordered]
    means = f"{fixed(first.over.mean)} to {fixed(last.over.mean)}"
    text = f"from {first.value} to {last.value}, {means}: {_gain(last, first)}."
    if before is not first:
        text += f" The last step, from {before.value}: {_gain(last, before)}."
    return text


def _compared(values: Sequence[Value], lead: set[str]) -> str:
    """The best point against the study's first, or, where that is the best, against the next."""
    best = max(values, key=lambda value: value.over.mean)
    others = [value for value in values if value is not best]
    other = values[0] if values[0] is not best else max(others, key=lambda value: value.over.mean)
    verb = "is best" if lead == {best.point} else "is highest"
    means = f"{best.point} {fixed(best.over.mean)} {verb}, against {other.point} {fixed(other.over.mean)}"
    return f"{means}: {_gain(best, other)}."


def _gain(value: Value, against: Value) -> str:
    difference = studies.point_difference(value, against)
    if difference is None:
        return "no seed in common, so no difference is told"
    over = difference.over
    if over.n < 2:
        return f"{signed(over.mean)} with one seed, which says nothing about chance"
    verdict = "no difference beyond seeds" if studies.may_be_chance(difference) else "beyond the chance of seeds"
    return f"{signed(over.mean)} (95 % interval {signed_between(over.low, over.high)}) over {over.n} seeds, {verdict}"
