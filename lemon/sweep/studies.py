"""What a sweep's table says of its points over seeds: Tables 2 and 5 and Figure 3 of the LEMON paper.

Seeds are of training; a value is the mean over folds that one encoder reached. Intervals are Student's t over seeds:
mean +- t(0.975, n - 1) s.d. / sqrt(n). They cover the chance of training, not that of the labelled nuclei.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lemon.probe.folds import LEAK_FREE
from lemon.probe.score import MAIN_METRICS
from lemon.probe.tables import holds_zero, leaders
from lemon.schema import SweepRow

ENCODERS = {"vit_s8": "ViT-S/8", "vit_b8": "ViT-B/8"}
"""How the paper writes the encoders of its Figure 3."""


class OverSeeds(NamedTuple):
    """Mean, standard deviation, standard error and 95 % t interval; all but the mean are NaN for a single seed."""

    n: int
    mean: float
    sd: float
    se: float
    low: float
    high: float


@dataclass(frozen=True)
class Value:
    """The main metric of a point on a task by a protocol."""

    point: str
    value: str
    task: str
    protocol: str
    metric: str
    encoder: str
    """Name of the encoder's preset; empty where unknown."""
    n_cells: int
    n_slides: int
    n_organs: int
    by_seed: dict[int, float]
    fold_spread: float
    """Mean over seeds of the standard deviation over folds; NaN where unknown."""

    @property
    def over(self) -> OverSeeds:
        """Over all seeds."""
        return over_seeds([*self.by_seed.values()])

    @property
    def column(self) -> tuple[str, str]:
        """The column of a table: task and protocol."""
        return self.task, self.protocol


class MissingResult(NamedTuple):
    """A trial, or a score of a trial, that is not there, and why."""

    trial: str
    status: str
    reason: str


class PointDifference(NamedTuple):
    """A point less another over the seeds that both have."""

    point: str
    against: str
    task: str
    protocol: str
    over: OverSeeds


def over_seeds(values: Sequence[float]) -> OverSeeds:
    """Mean over seeds and what is known of its chance."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return OverSeeds(n, mean, *[math.nan] * 4)
    sd = float(np.std(values, ddof=1))
    se = sd / math.sqrt(n)
    half = float(stats.t.ppf(0.975, n - 1)) * se
    return OverSeeds(n, mean, sd, se, mean - half, mean + half)


def point_names(rows: Iterable[SweepRow]) -> list[str]:
    """All points of a sweep's rows, those without a result too, in the sweep's order."""
    return list(dict.fromkeys(row.point for row in rows))


def study_values(rows: Sequence[SweepRow]) -> list[Value]:
    """The main metric of the linear probe of every point, task and protocol, in the order of points, then of tasks."""
    groups: dict[tuple[str, str | None, str | None], list[SweepRow]] = {}
    for row in rows:
        if row.status == "done" and row.metric in MAIN_METRICS and is_number(row.mean):
            groups.setdefault((row.point, row.task, row.protocol), []).append(row)
    order = {name: place for place, name in enumerate(point_names(rows))}
    facts = ("point", "value", "task", "protocol", "metric", "n_cells", "n_slides", "n_organs")
    return [
        Value(
            **{name: getattr(group_rows[0], name) for name in facts},
            encoder=group_rows[0].encoder or "",
            by_seed={row.seed: row.mean for row in group_rows if row.mean is not None},
            fold_spread=float(np.mean([math.nan if row.spread is None else row.spread for row in group_rows])),
        )
        for _, group_rows in sorted(groups.items(), key=lambda item: order[item[0][0]])
    ]


def missing_results(rows: Iterable[SweepRow]) -> list[MissingResult]:
    """Every trial, or score of a trial, that is not there."""
    missing = []
    for row in rows:
        if row.status != "done":
            missing.append(MissingResult(row.trial, row.status, row.error or ""))
        elif row.metric in MAIN_METRICS and not is_number(row.mean):
            reason = f"{row.metric} on {row.task} ({row.protocol}) is not a number"
            missing.append(MissingResult(row.trial, "no score", reason))
    return missing


def point_difference(value: Value, against: Value) -> PointDifference | None:
    """``value`` less ``against``, paired by seed; None where they share no seed."""
    seeds = sorted(value.by_seed.keys() & against.by_seed.keys())
    if not seeds:
        return None
    over = over_seeds([value.by_seed[seed] - against.by_seed[seed] for seed in seeds])
    return PointDifference(value.point, against.point, value.task, value.protocol, over)


def differences_to_first(values: Sequence[Value]) -> list[PointDifference]:
    """Every point against the study's first one that has a result, on each task by each protocol."""
    first: dict[tuple[str, str], Value] = {}
    all_differences = [point_difference(value, first.setdefault(value.column, value)) for value in values]
    return [each for each in all_differences if each is not None and each.point != each.against]


class Best(NamedTuple):
    """The point of highest mean on a task by a protocol, and its difference to the next one, paired by seed."""

    value: Value
    lead: PointDifference | None
    """None where there is no other point, or none with the same seeds."""

    @property
    def sentence(self) -> str:
        """Which it is, with its interval, and whether its lead may be chance: 95 % intervals over seeds."""
        value, over, lead = self.value, self.value.over, self.lead
        interval = f" ({over.low:.3f} to {over.high:.3f} over {over.n} seeds)" if over.n > 1 else " (one seed)"
        text = (
            f"{value.task}, {value.protocol}: {value.point} has the highest {value.metric}, {over.mean:.3f}{interval}"
        )
        if lead is None:
            return text
        verdict = "may be chance" if may_be_chance(lead) else "is beyond chance"
        return f"{text}; its lead over {lead.against}, {lead.over.mean:.3f}, {verdict}"


def best_points(values: Iterable[Value]) -> list[Best]:
    """Of each task and protocol the best point."""
    columns: dict[tuple[str, str], list[Value]] = {}
    for value in values:
        columns.setdefault(value.column, []).append(value)
    ranked = [sorted(each, key=lambda value: -value.over.mean) for each in columns.values()]
    return [Best(best, point_difference(best, others[0]) if others else None) for best, *others in ranked]


def leading_points(values: Sequence[Value]) -> dict[tuple[str, str], set[str]]:
    """Column -> its best point with all that it cannot be told apart from over seeds; none where that is all."""
    columns: dict[tuple[str, str], dict[str, Value]] = {}
    for value in values:
        columns.setdefault(value.column, {})[value.point] = value

    def is_chance(points: dict[str, Value], first: str, second: str) -> bool:
        return may_be_chance(point_difference(points[first], points[second]))

    return {
        column: leaders(
            {point: value.over.mean for point, value in points.items()}, functools.partial(is_chance, points)
        )
        for column, points in columns.items()
    }


def may_be_chance(difference: PointDifference | None) -> bool:
    """Whether the interval of a difference holds 0, or is not known, as with a single seed."""
    return difference is None or holds_zero(difference.over.low, difference.over.high)


def main_values(values: Sequence[Value]) -> dict[str, list[Value]]:
    """Task -> its values by one protocol: without leaks where there is such a one, else the first."""
    by_task: dict[str, list[Value]] = {}
    for value in values:
        by_task.setdefault(value.task, []).append(value)
    chosen = {}
    for task, task_values in by_task.items():
        protocol = LEAK_FREE if any(value.protocol == LEAK_FREE for value in task_values) else task_values[0].protocol
        chosen[task] = [value for value in task_values if value.protocol == protocol]
    return chosen


def task_means(values: Sequence[Value]) -> list[Value]:
    """Each point's mean over the tasks, seed by seed: what Figure 3 shows.

    By one protocol a task, as ``main_values`` chooses. Only points and seeds that have every task count, so that all
    means are over the same. Where there is one task, its own values.
    """
    by_task = main_values(values)
    if len(by_task) < 2:
        return [value for own in by_task.values() for value in own]
    by_point: dict[str, list[Value]] = {}
    for own in by_task.values():
        for value in own:
            by_point.setdefault(value.point, []).append(value)
    means = []
    for own in by_point.values():
        seeds = sorted(set.intersection(*({*value.by_seed} for value in own)))
        if len(own) == len(by_task) and seeds:
            by_seed = {seed: float(np.mean([value.by_seed[seed] for value in own])) for seed in seeds}
            mean = replace(
                own[0],
                task=f"mean of {len(own)} tasks",
                protocol=" / ".join(dict.fromkeys(value.protocol for value in own)),
                metric=" / ".join(dict.fromkeys(value.metric for value in own)),
                by_seed=by_seed,
                fold_spread=math.nan,
            )
            means.append(mean)
    return means


def curves(values: Sequence[Value], *, study: str) -> dict[str, list[Value]]:
    """Values by curve of Figure 3: one an encoder, of ``organs`` one an encoder and number of slides."""
    several = len({value.encoder for value in values}) > 1
    by_curve: dict[str, list[Value]] = {}
    for value in sorted(values, key=lambda value: value.n_slides) if study == "organs" else values:
        slides = f"{value.n_slides:,} slides" if study == "organs" else ""
        encoder = ENCODERS.get(value.encoder, value.encoder) if several or not slides else ""
        by_curve.setdefault(", ".join(filter(None, (encoder, slides))), []).append(value)
    return by_curve


def value_records(values: Sequence[Value]) -> list[dict[str, Any]]:
    """Rows of a study's CSV."""
    names = ("point", "value", "task", "protocol", "metric", "encoder", "n_cells", "n_slides", "n_organs")
    return [
        {name: getattr(value, name) for name in names}
        | {"seeds": " ".join(map(str, sorted(value.by_seed)))}
        | value.over._asdict()
        | {"sd_over_folds": value.fold_spread}
        for value in values
    ]


def difference_records(differences: Sequence[PointDifference]) -> list[dict[str, Any]]:
    """Rows of a study's CSV of paired differences."""
    names = ("point", "against", "task", "protocol")
    return [{name: getattr(each, name) for name in names} | each.over._asdict() for each in differences]


def is_number(value: float | None) -> bool:
    """Whether there is a value, and a finite one."""
    return value is not None and math.isfinite(value)
