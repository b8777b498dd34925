"""Figures of sweeps: the paper's Figure 3 (scaling), and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemon.probe.figures import Links, log_limits, panel_grid, plain, short
from lemon.sweep import studies
from lemon.sweep.studies import Value

AXES = {"size": ("cells", "n_cells"), "slides": ("slides", "n_slides"), "organs": ("organs", "n_organs")}
"""Study of Figure 3 -> what its x axis is, in words and as a field of a value."""

_MARKERS = "osD^vP*X"


def scaling_figures(study: str, values: Sequence[Value], *, links: Links | None = None) -> dict[str, Figure]:
    """End of a file's stem -> figure: the mean over tasks, and ``_tasks`` with a panel a task where there are several.

    Where no point has a score on every task, there is no mean, and the panels stand alone.
    """
    means = studies.task_means(values)
    figures = {"": scaling_figure(study, means, links=links)} if means else {}
    if len(studies.main_values(values)) > 1:
        figures["_tasks" if means else ""] = scaling_tasks_figure(study, values, links=links)
    return figures


def scaling_figure(study: str, means: Sequence[Value], *, links: Links | None = None) -> Figure:
    """Figure 3 as the paper has it: the mean over the tasks, a curve an encoder, against cells, slides or organs (log).

    Args:
        study: one of ``AXES``.
        means: ``studies.task_means`` of a study's values. A point is their mean over seeds, its bar the standard error;
            of ``organs`` there is a curve for each number of slides.
        links: point of the study -> where it leads in an SVG file.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    _scaling_panel(figure.subplots(), study, means, links or {})
    return figure


def scaling_tasks_figure(study: str, values: Sequence[Value], *, links: Links | None = None) -> Figure:
    """The same with a panel a task."""
    tasks = studies.main_values(values)
    figure, axes = panel_grid(len(tasks), width=4.6, height=3.4)
    for axis, (task, own) in zip(axes, tasks.items(), strict=True):
        _scaling_panel(axis, study, own, links or {})
        axis.set_title(short(task), fontsize=10)
    return figure


def _scaling_panel(axis: Any, study: str, values: Sequence[Value], links: Links) -> None:
    title, field = AXES[study]
    for number, (label, own) in enumerate(studies.curves(values, study=study).items()):
        _line(axis, own, field=field, number=number, label=label, links=links)
    _finish(axis, title=f"{title} in pretraining", metrics=values)


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


def _line(axis: Any, values: Sequence[Value], *, field: str, number: int, label: str, links: Links) -> None:
    """Points in the order of x; a bar only where there are two seeds or more."""
    ordered = sorted(values, key=lambda value: getattr(value, field))
    x, overs = [getattr(value, field) for value in ordered], [value.over for value in ordered]
    color, marker = f"C{number % 10}", _MARKERS[number % len(_MARKERS)]
    axis.plot(x, [over.mean for over in overs], color=color, marker=marker, label=plain(label))
    for value, at, over in zip(ordered, x, overs, strict=True):
        if value.point in links:  # a line is one element, so a point that leads somewhere is drawn again
            axis.scatter(at, over.mean, color=color, marker=marker, zorder=3).set_urls([links[value.point]])
    barred = [(at, over) for at, over in zip(x, overs, strict=True) if over.n > 1]
    if barred:
        means, errors = [over.mean for _, over in barred], [over.se for _, over in barred]
        axis.errorbar([at for at, _ in barred], means, yerr=errors, fmt="none", color=color, capsize=3)


def _finish(axis: Any, *, title: str, metrics: Sequence[Value]) -> None:
    ticks = sorted({float(at) for line in axis.lines for at in np.asarray(line.get_xdata(), float)})
    axis.set_xscale("log")
    axis.set_xlim(*log_limits(ticks))
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axis.minorticks_off()
    of = {value.task for value in metrics if value.task.startswith("mean of ")}
    names = dict.fromkeys(value.metric.replace("_", " ") for value in metrics)
    bars = " (s.e. over seeds)" if any(value.over.n > 1 for value in metrics) else ""
    axis.set(xlabel=title, ylabel="\n".join([*of, " / ".join(names) + bars]))
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8)
