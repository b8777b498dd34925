"""A figure of scores with their intervals: a panel a task, a line an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemon.probe.figures import plain
from lemon.probe.tables import ScoreCell

PANELS_A_ROW = 4

_INK, _SOFT, _TRAINED = "#000000", "#8a8a8a", "#1f77b4"


@dataclass(frozen=True)
class ScoreLine:
    """An encoder: its cell by task, where it leads, what its points link to."""

    label: str
    cells: dict[str, ScoreCell]
    untrained: bool = False
    leads: set[str] = field(default_factory=set)
    href: str = ""


def scores_figure(lines: Sequence[ScoreLine], *, tasks: dict[str, str], metrics: dict[str, str]) -> Figure:
    """Mean over folds with its 95 % interval, encoders from top to bottom.

    Filled where an encoder leads, hollow in grey where it is untrained.

    Args:
        lines: in the order of the page, from the top.
        tasks: task -> title of its panel.
        metrics: task -> name of its score.
    """
    columns = min(len(tasks), PANELS_A_ROW)
    rows = -(-len(tasks) // columns)
    names = max(len(line.label) for line in lines)
    width = 0.4 + 0.075 * min(names, 40) + (3.3 if columns == 1 else 2.3 * columns)
    figure = Figure(figsize=(width, rows * (0.9 + 0.3 * len(lines))), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    for axis, task in zip(axes, tasks, strict=False):
        _panel(axis, lines, task=task)
        axis.set_title(plain(tasks[task]), fontsize=10)
        axis.set_xlabel(metrics[task], fontsize=9)
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    axes[0].set_yticks(range(len(lines)), [plain(line.label) for line in lines], fontsize=9)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    return figure


def _panel(axis: Any, lines: Sequence[ScoreLine], *, task: str) -> None:
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.locator_params(axis="x", nbins=5)
    for at, line in enumerate(lines):
        cell = line.cells.get(task)
        if cell is None:
            continue
        color = _SOFT if line.untrained else _TRAINED
        axis.hlines(at, cell.low, cell.high, color=color, lw=1.6)  # nothing where there is no interval
        filled = color if task in line.leads else "none"
        point = axis.scatter([cell.mean], [at], s=46, facecolors=filled, edgecolors=color, linewidths=1.6, zorder=3)
        point.set_urls([line.href])
