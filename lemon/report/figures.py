"""Figures of scores: the paper's Figure 2, accuracy against arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemon.report.tables import encoder_labels, main_cells, read_scores
from lemon.storage import Store


def draw_cost(output: str | Path) -> list[str]:
    """Draw Figure 2 of an output of ``jobs/probe.py``, a panel a task; returns the names of the files (PNG, SVG).

    One point an encoder: mean over folds of the main metric without leaks, with its standard deviation, against GFLOP a
    cell (true arithmetic, a multiply-add being two).
    """
    store = Store(output)
    points = cost_points(store)
    if not points:
        return []  # the paper's protocol alone was asked for
    tasks = sorted({point["task"] for point in points})
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(tasks)))
    for axis, task in zip(axes, tasks, strict=True):
        _panel(axis, [point for point in points if point["task"] == task], task=task)
    axes[0].set_ylabel("score without leaks (s.d. over folds)")
    for suffix in ("png", "svg"):
        with store.write(f"figure2.{suffix}") as stream:
            figure.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return ["figure2.png", "figure2.svg"]


def cost_points(store: Store) -> list[dict[str, Any]]:
    """encoder, task, gflop, mean, spread of every encoder whose cost is known; the protocol is the leak-free one."""
    rows = read_scores(store).to_pylist()
    labels, points = encoder_labels(rows), []
    for (stem, task, protocol), cell in sorted(main_cells(rows).items()):
        name = f"costs/{stem}.json"
        if protocol == "leak-free" and store.exists(name):
            gflop = store.read_json(name)["flop"] / 1e9
            points.append(
                {"encoder": labels[stem], "task": task, "gflop": gflop, "mean": cell.mean, "spread": cell.spread}
            )
    return points


def _panel(axis: Any, points: Sequence[dict[str, Any]], *, task: str) -> None:
    axis.set_xscale("log")
    costs = [point["gflop"] for point in points]
    middle = np.sqrt(min(costs) * max(costs))
    for number, point in enumerate(sorted(points, key=lambda point: point["gflop"])):
        color = f"C{number % 10}"
        axis.errorbar(point["gflop"], point["mean"], yerr=point["spread"], fmt="o", color=color, capsize=3)
        # Labels point inwards, so that none runs over the frame.
        side = "right" if point["gflop"] > middle else "left"
        axis.annotate(
            point["encoder"],
            (point["gflop"], point["mean"]),
            xytext=(-6 if side == "right" else 6, 5),
            textcoords="offset points",
            ha=side,
            fontsize=8,
        )
    axis.set_title(task if len(task) < 40 else f"...{task[-37:]}", fontsize=10)
    axis.set_xlabel("GFLOP a cell")
    axis.margins(x=0.25, y=0.15)
    axis.grid(alpha=0.3)
