"""Figures of scores: the paper's Figure 2 (accuracy against arithmetic) and Figure 3 (scaling), and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lemon.report.studies import Value, main_values
from lemon.report.tables import encoder_labels, main_cells, read_scores
from lemon.runtime.store import Store

AXES = {"size": ("cells", "n_cells"), "slides": ("slides", "n_slides")}
"""Study -> what its x axis is, in words and as a field of a value; ``organs`` has a figure of its own kind."""

_MARKERS = "osD^vP*X"


def save_figure(figure: Figure, store: Store, stem: str) -> list[str]:
    """Write <stem>.png and <stem>.svg; returns their names."""
    for suffix in ("png", "svg"):
        with store.write(f"{stem}.{suffix}") as stream:
            figure.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return [f"{stem}.png", f"{stem}.svg"]


def draw_cost(output: str | Path) -> list[str]:
    """Draw Figure 2 of an output of ``jobs/probe.py`` into it; returns the names of the files (PNG, SVG)."""
    store = Store(output)
    points = cost_points(store)
    return save_figure(cost_figure(points), store, "figure2") if points else []  # the paper's protocol alone: none


def cost_figure(points: Sequence[dict[str, Any]]) -> Figure:
    """Figure 2, a panel a task.

    One point an encoder: mean over folds of the main metric without leaks, with its standard deviation, against GFLOP a
    cell (true arithmetic, a multiply-add being two).
    """
    tasks = sorted({point["task"] for point in points})
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(tasks)))
    for axis, task in zip(axes, tasks, strict=True):
        _panel(axis, [point for point in points if point["task"] == task], task=task)
    axes[0].set_ylabel("score without leaks (s.d. over folds)")
    return figure


def scaling_figure(study: str, values: Sequence[Value]) -> Figure:
    """Figure 3, a line a task: the mean over seeds with its standard error, against cells or slides (log)."""
    title, field = AXES[study]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, (task, own) in enumerate(main_values(values).items()):
        _line(axis, own, field=field, number=number, label=_plain(task))
    _finish(axis, title=f"{title} in pretraining", metrics=values)
    return figure


def organs_figure(values: Sequence[Value]) -> Figure:
    """Figure 3, a panel a task, a line a number of slides: against the number of organs."""
    tasks = main_values(values)
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    for axis, (task, own) in zip(np.atleast_1d(figure.subplots(1, len(tasks))), tasks.items(), strict=True):
        for number, slides in enumerate(sorted({value.n_slides for value in own})):
            line = [value for value in own if value.n_slides == slides]
            _line(axis, line, field="n_organs", number=number, label=f"{slides:,} slides")
        axis.set_title(_short(task), fontsize=10)
        _finish(axis, title="organs in pretraining", metrics=own)
    return figure


def curves_figure(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]) -> Figure:
    """The loss by step: a colour a point of a study, a line a seed of (step, loss)."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, (point, seeds) in enumerate(curves.items()):
        for first, history in enumerate(seeds):
            label = None if first else _plain(point)
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


def cost_points(store: Store) -> list[dict[str, Any]]:
    """encoder, task, gflop, paper_gmac (``lemon.encoders.cost``), mean, spread, by the leak-free protocol."""
    rows = read_scores(store).to_pylist()
    labels, points = encoder_labels(rows), []
    for (stem, task, protocol), cell in sorted(main_cells(rows).items()):
        name = f"costs/{stem}.json"
        if protocol == "leak-free" and store.exists(name):
            cost = {name: value / 1e9 for name, value in store.read_json(name, dict[str, float]).items()}
            named = {"encoder": labels[stem], "task": task, "gflop": cost["flop"], "paper_gmac": cost["paper_mac"]}
            points.append(named | {"mean": cell.mean, "spread": cell.spread})
    return points


def _panel(axis: Any, points: Sequence[dict[str, Any]], *, task: str) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    costs = [point["gflop"] for point in points]
    middle = np.sqrt(min(costs) * max(costs))
    for number, point in enumerate(sorted(points, key=lambda point: point["gflop"])):
        color = f"C{number % 10}"
        axis.errorbar(point["gflop"], point["mean"], yerr=point["spread"], fmt="o", color=color, capsize=3)
        # Labels point inwards, so that none runs over the frame.
        side = "right" if point["gflop"] > middle else "left"
        axis.annotate(
            _plain(point["encoder"]),
            (point["gflop"], point["mean"]),
            xytext=(-6 if side == "right" else 6, -11 if number % 2 else 5),  # encoders of one cost lie side by side
            textcoords="offset points",
            ha=side,
            fontsize=8,
        )
    axis.set_title(_short(task), fontsize=10)
    axis.set_xlabel("GFLOP a cell")
    axis.margins(x=0.25, y=0.15)
    axis.grid(alpha=0.3)


def _plain(text: str) -> str:
    """A name that matplotlib draws as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _short(task: str) -> str:
    return _plain(task if len(task) < 40 else f"...{task[-37:]}")
