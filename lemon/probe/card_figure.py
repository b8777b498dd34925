"""The picture of robustness cards: a line for each measure, from its worst to its best value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lemon.probe.figures import plain
from lemon.probe.measures import MEASURES, place_of, shown_task
from lemon.probe.tables import encoder_labels, encoder_stem
from lemon.schema import RobustnessRow

_GREY = "0.85"
_ROW_IN = 0.27


def card_figure(rows: Sequence[RobustnessRow]) -> Figure:
    """A point with its interval for each measure and encoder; the tick is chance.

    All measures run from their worst value on the left to their best on the right, so that they can be read together;
    the numbers are at the right for a single encoder.
    """
    labels = encoder_labels(rows)
    slots = _slots(rows)
    figure = Figure(figsize=(7.4, 0.9 + _ROW_IN * len(slots)), layout="constrained")
    axis = figure.subplots()
    for y, (task, measure) in enumerate(slots):
        if measure is None:
            axis.text(-0.02, y, plain(shown_task(task)), ha="right", va="center", fontsize=9, fontweight="bold")
            continue
        of_line = [row for row in rows if (row.task, row.measure) == (task, measure)]
        axis.plot([0, 1], [y, y], color=_GREY, lw=1, zorder=1)
        axis.text(-0.02, y, MEASURES[measure].title, ha="right", va="center", fontsize=8)
        if of_line[0].chance is not None:
            axis.plot([_position(of_line[0], of_line[0].chance)] * 2, [y - 0.3, y + 0.3], color="0.5", lw=1)
        for row in of_line:
            _point(axis, row, y, number=list(labels).index(encoder_stem(row)), among=len(labels))
    _finish(axis, [plain(label) for label in labels.values()], n_slots=len(slots))
    return figure


def _slots(rows: Sequence[RobustnessRow]) -> list[tuple[str, str | None]]:
    """(task, measure) of each line from the top; a task's heading has None."""
    slots: list[tuple[str, str | None]] = []
    for task in sorted({row.task for row in rows}, key=place_of):
        present = {row.measure for row in rows if row.task == task}
        slots += [(task, None), *((task, measure) for measure in MEASURES if measure in present)]
    return slots


def _position(row: RobustnessRow, value: float) -> float:
    """From 0, the worst, to 1, the best; what lies beyond is drawn at the end."""
    measure = MEASURES[row.measure]
    best = measure.best if measure.best is not None else row.chance or 0.0
    return float(np.clip((value - measure.worst) / (best - measure.worst), 0, 1))


def _point(axis: Any, row: RobustnessRow, y: int, *, number: int, among: int) -> None:
    at = y + 0.5 * ((number + 0.5) / among - 0.5)  # encoders of one line lie below each other
    if row.low is not None and row.high is not None:
        axis.plot([_position(row, row.low), _position(row, row.high)], [at, at], color=f"C{number % 10}", lw=1.6)
    axis.plot(_position(row, row.value), at, "o", color=f"C{number % 10}", ms=4.5)
    if among == 1:
        axis.text(1.02, y, f"{row.value:.3f}", va="center", fontsize=8)


def _finish(axis: Any, labels: list[str], *, n_slots: int) -> None:
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(n_slots - 0.4, -0.9)
    axis.set_yticks([])
    axis.set_xticks([0, 1], ["worst", "best"], fontsize=8)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.plot([], [], "|", color="0.5", ms=9, label="chance")
    for number, label in enumerate(labels):
        axis.plot([], [], "o", color=f"C{number % 10}", ms=4.5, label=label)
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=min(4, len(labels) + 1), fontsize=8, frameon=False
    )
