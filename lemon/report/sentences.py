"""What was found, in sentences that are computed from the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lemon.probe.folds import LEAK_FREE
from lemon.probe.tables import PairedDifference, encoder_labels, main_cells, paired_differences
from lemon.report.blocks import bracketed, fixed, plural, signed, signed_interval
from lemon.report.figures import AXES
from lemon.report.sources import OutputTable
from lemon.schema import ScoreRow, SweepRow
from lemon.sweep import studies
from lemon.sweep.studies import Value


def study_sentences(sweep: OutputTable[SweepRow]) -> Iterator[str]:
    """One sentence or two a task: what a study's best point, or its largest, gains."""
    study = sweep.rows[0].study
    for task, task_values in studies.main_values(studies.study_values(sweep.rows)).items():
        head = f"{study}, {task} ({task_values[0].protocol}"
        encoders = dict.fromkeys(value.encoder for value in task_values) if study in AXES else {}
        if len(encoders) < 2:
            yield f"{head}): {_verdict(study, task_values)}"
        for encoder in encoders if len(encoders) > 1 else ():
            own = [value for value in task_values if value.encoder == encoder]
            yield f"{head}, {encoder}): {_verdict(study, own)}"
    lost = {each.trial for each in studies.missing_results(sweep.rows)}
    if lost:
        yield f"{study}: {plural(len(lost), 'trial')} without a result, listed with the reason below."


def probe_sentences(probe: OutputTable[ScoreRow]) -> Iterator[str]:
    """One sentence a task: the best encoder by splits without leaks, beside the next."""
    labels = encoder_labels(probe.rows)
    by_task: dict[str, list[tuple[float, float, str]]] = {}
    for (stem, task, protocol), cell in main_cells(probe.rows).items():
        if protocol == LEAK_FREE:
            by_task.setdefault(task, []).append((cell.mean, cell.spread, labels[stem]))
    pairs = list(paired_differences(probe.store, labels))
    for task, scores in sorted(by_task.items()):
        ranked = sorted(scores, reverse=True)
        mean, spread, best = ranked[0]
        text = f"encoders, {task} ({LEAK_FREE}): {best} {bracketed(mean, spread)} over folds"
        if len(ranked) == 1:
            yield f"{text}, the only encoder."
            continue
        text += f" is best; next is {ranked[1][2]}, {bracketed(*ranked[1][:2])}."
        yield f"{text} {_paired(pairs, task, best, ranked[1][2])}".strip()


def _verdict(study: str, values: Sequence[Value]) -> str:
    if len(values) == 1:
        return f"{values[0].point} {fixed(values[0].over.mean)}, the only point with a result."
    return _scaled(values) if study in AXES else _compared(values)


def _scaled(values: Sequence[Value]) -> str:
    """From the smallest point to the largest, and what the last step gives."""
    ordered = sorted(values, key=lambda value: (value.n_organs, value.n_slides, value.n_cells))
    first, *_, before, last = [ordered[0], *ordered]
    means = f"{fixed(first.over.mean)} to {fixed(last.over.mean)}"
    text = f"from {first.value} to {last.value}, {means}: {_gain(last, first)}."
    if before is not first:
        text += f" The last step, from {before.value}: {_gain(last, before)}."
    return text


def _compared(values: Sequence[Value]) -> str:
    """The best point against the study's first, or, where that is the best, against the next."""
    best = max(values, key=lambda value: value.over.mean)
    others = [value for value in values if value is not best]
    other = values[0] if values[0] is not best else max(others, key=lambda value: value.over.mean)
    means = f"{best.point} {fixed(best.over.mean)} is best, against {other.point} {fixed(other.over.mean)}"
    return f"{means}: {_gain(best, other)}."


def _gain(value: Value, against: Value) -> str:
    difference = studies.point_difference(value, against)
    if difference is None:
        return "no seed in common, so no difference is told"
    over = difference.over
    if over.n < 2:
        return f"{signed(over.mean)} with one seed, which says nothing about chance"
    verdict = "no difference beyond seeds" if over.low <= 0 <= over.high else "beyond the chance of seeds"
    return f"{signed(over.mean)} (95 % interval {signed_interval(over)}) over {over.n} seeds, {verdict}"


def _paired(pairs: Sequence[PairedDifference], task: str, best: str, second: str) -> str:
    for pair in pairs:
        if (pair.task, pair.protocol, {pair.encoder, pair.against}) != (task, LEAK_FREE, {best, second}):
            continue
        sign = 1 if pair.encoder == best else -1
        low, high = sorted((sign * pair.low, sign * pair.high))
        verdict = "no difference beyond slides" if low <= 0 <= high else "beyond the chance of slides"
        bounds = f"{signed(low)} to {signed(high)}"
        return f"Pooled, they differ by {signed(sign * pair.difference)} (95 % interval {bounds}), {verdict}."
    return ""
