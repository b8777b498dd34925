"""Figure 2 of the paper, scores against arithmetic, and what all figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lemon.probe.tables import encoder_labels, main_cells, read_scores
from lemon.runtime.store import Store


class CostPoint(NamedTuple):
    """An encoder on a task by the leak-free protocol: ``lemon.encoders.cost``, mean and s.d. over folds."""

    encoder: str
    task: str
    gflop: float
    paper_gmac: float
    mean: float
    spread: float


def save_figure(figure: Figure, store: Store, stem: str) -> list[str]:
    """Write <stem>.png and <stem>.svg; returns their names."""
    for suffix in ("png", "svg"):
        with store.write(f"{stem}.{suffix}") as stream:
            figure.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return [f"{stem}.png", f"{stem}.svg"]


def draw_cost(store: Store) -> list[str]:
    """Draw Figure 2 of an output of ``lemon probe`` into it; returns the names of the files (PNG, SVG)."""
    points = cost_points(store)
    return save_figure(cost_figure(points), store, "figure2") if points else []  # the paper's protocol alone: none


def cost_figure(points: Sequence[CostPoint]) -> Figure:
    """Figure 2, a panel a task.

    One point an encoder: mean over folds of the main metric without leaks, with its standard deviation, against GFLOP a
    cell (true arithmetic, a multiply-add being two).
    """
    tasks = sorted({point.task for point in points})
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(tasks)))
    for axis, task in zip(axes, tasks, strict=True):
        _panel(axis, [point for point in points if point.task == task], task=task)
    axes[0].set_ylabel("score without leaks (s.d. over folds)")
    return figure


def cost_points(store: Store) -> list[CostPoint]:
    """What Figure 2 shows, by encoder and task."""
    rows = read_scores(store)
    labels, points = encoder_labels(rows), []
    for (stem, task, protocol), cell in sorted(main_cells(rows).items()):
        name = f"costs/{stem}.json"
        if protocol == "leak-free" and store.exists(name):
            cost = {name: value / 1e9 for name, value in store.read_json(name, dict[str, float]).items()}
            points.append(CostPoint(labels[stem], task, cost["flop"], cost["paper_mac"], cell.mean, cell.spread))
    return points


def _panel(axis: Any, points: Sequence[CostPoint], *, task: str) -> None:
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    costs = [point.gflop for point in points]
    middle = np.sqrt(min(costs) * max(costs))
    for number, point in enumerate(sorted(points, key=lambda point: point.gflop)):
        color = f"C{number % 10}"
        axis.errorbar(point.gflop, point.mean, yerr=point.spread, fmt="o", color=color, capsize=3)
        # Labels point inwards, so that none runs over the frame.
        side = "right" if point.gflop > middle else "left"
        axis.annotate(
            plain(point.encoder),
            (point.gflop, point.mean),
            xytext=(-6 if side == "right" else 6, -11 if number % 2 else 5),  # encoders of one cost lie side by side
            textcoords="offset points",
            ha=side,
            fontsize=8,
        )
    axis.set_title(short(task), fontsize=10)
    axis.set_xlabel("GFLOP a cell")
    axis.margins(x=0.25, y=0.15)
    axis.grid(alpha=0.3)


def plain(text: str) -> str:
    """A name that matplotlib draws as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def short(task: str) -> str:
    return plain(task if len(task) < 40 else f"...{task[-37:]}")
