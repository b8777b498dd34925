"""Figures of sweeps: the paper's Figure 3 (scaling), and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemon.probe.figures import plain, short
from lemon.sweep.studies import Value, main_values

AXES = {"size": ("cells", "n_cells"), "slides": ("slides", "n_slides")}
"""Study -> what its x axis is, in words and as a field of a value; ``organs`` has a figure of its own kind."""

_MARKERS = "osD^vP*X"


def scaling_figure(study: str, values: Sequence[Value]) -> Figure:
    """Figure 3, a line a task: the mean over seeds with its standard error, against cells or slides (log)."""
    title, field = AXES[study]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, (task, task_values) in enumerate(main_values(values).items()):
        _line(axis, task_values, field=field, number=number, label=plain(task))
    _finish(axis, title=f"{title} in pretraining", metrics=values)
    return figure


def organs_figure(values: Sequence[Value]) -> Figure:
    """Figure 3, a panel a task, a line a number of slides: against the number of organs."""
    tasks = main_values(values)
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    for axis, (task, task_values) in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks.items(), strict=True):
        for number, slides in enumerate(sorted({value.n_slides for value in task_values})):
            line = [value for value in task_values if value.n_slides == slides]
            _line(axis, line, field="n_organs", number=number, label=f"{slides:,} slides")
        axis.set_title(short(task), fontsize=10)
        _finish(axis, title="organs in pretraining", metrics=task_values)
    return figure


def curves_figure(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Figure:
    """The loss by step: a colour a point of a study, a line a seed of (step, loss)."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (point, seeds) in enumerate(curves.items()):
        for first, history in enumerate(seeds):
            label = None if first else plain(point)
            axis.plot(*zip(*history, strict=True), color=f"C{number % 10}", lw=1, alpha=0.8, label=label)
    axis.set(xlabel="step", ylabel="loss of pretraining")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _line(axis: Any, values: Sequence[Value], *, field: str, number: int, label: str) -> None:
    """Points in the order of x; a bar only where there are two seeds or more."""
    ordered = sorted(values, key=lambda value: getattr(value, field))
    x, overs = [getattr(value, field) for value in ordered], [value.over for value in ordered]
    color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
    axis.plot(x, [over.mean for over in overs], color=color, marker=marker, label=label)
    barred = [(at, over) for at, over in zip(x, overs, strict=True) if over.n > 1]
    if barred:
        means, errors = [over.mean for _, over in barred], [over.se for _, over in barred]
        axis.errorbar([at for at, _ in barred], means, yerr=errors, fmt="none", color=color, capsize=3)


def _finish(axis: Any, *, title: str, metrics: Sequence[Value]) -> None:
    axis.set_xscale("log")
    ticks = sorted({float(at) for line in axis.lines for at in np.asarray(line.get_xdata(), float)})
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()
    names = dict.fromkeys(value.metric.replace("_", " ") for value in metrics)
    bars = " (s.e. over seeds)" if any(value.over.n > 1 for value in metrics) else ""
    axis.set(xlabel=title, ylabel=" / ".join(names) + bars)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
