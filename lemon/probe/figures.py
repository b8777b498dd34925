"""Figure 2 of the paper, scores against arithmetic: its data, its drawing, and what all figures share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

from lemon.encoders.registry import FAMILIES, family_of
from lemon.probe.folds import LEAK_FREE, PAPER
from lemon.probe.tables import encoder_labels, encoder_stem, main_cells, read_scores, task_labels
from lemon.runtime.store import Store

PANELS = {
    "cell types: NuCLS, MIDOG": ("nucls-super", "nucls-main", "nucls-raw", "midog25-atypical"),
    "gene expression: HEST": ("hest-bowel", "hest-breast", "hest-lung"),
}
"""The panels of the paper's Figure 2, and the tasks that each is a mean over."""


class CostPoint(NamedTuple):
    """An encoder on a task by one protocol: ``lemon.encoders.cost``, mean and s.d. over folds."""

    encoder: str
    family: str
    task: str
    parameters: int
    gflop: float
    paper_gmac: float
    mean: float
    spread: float


class CostMean(NamedTuple):
    """An encoder in a panel of Figure 2: the mean of its scores on ``tasks`` (names with blanks between)."""

    panel: str
    encoder: str
    family: str
    parameters: int
    gflop: float
    paper_gmac: float
    mean: float
    tasks: str


def save_figure(figure: Figure, store: Store, stem: str) -> list[str]:
    """Write <stem>.png and <stem>.svg; returns their names."""
    for suffix in ("png", "svg"):
        with store.write(f"{stem}.{suffix}") as stream:
            figure.savefig(stream, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return [f"{stem}.png", f"{stem}.svg"]


def draw_cost(store: Store) -> list[str]:
    """Draw Figure 2 of an output of ``lemon probe`` into it; returns the names of the files (PNG, SVG).

    ``figure2`` has the paper's two panels, and ``figure2_tasks`` a panel a task; where none of the paper's tasks was
    scored, ``figure2`` has a panel a task.
    """
    points = cost_points(store)
    return [name for stem, figure in cost_figures(points).items() for name in save_figure(figure, store, stem)]


# --- data -------------------------------------------------------------------------------------------------------------


def cost_points(store: Store, *, protocol: str = LEAK_FREE) -> list[CostPoint]:
    """What Figure 2 is made from, by encoder and task.

    Args:
        store: output of ``lemon probe``.
        protocol: whose splits; for ``paper`` a task whose paper's splits are the leak-free ones counts by those.
    """
    rows = read_scores(store)
    labels, models = encoder_labels(rows), {encoder_stem(row): row.model for row in rows}
    cells, points = main_cells(rows), []
    for (stem, task, own), cell in sorted(cells.items()):
        name = f"costs/{stem}.json"
        chosen = own == protocol or (protocol == PAPER and own == LEAK_FREE and (stem, task, PAPER) not in cells)
        if chosen and store.exists(name):
            cost = store.read_json(name, dict[str, float])
            facts = (int(cost["parameters"]), cost["flop"] / 1e9, cost["paper_mac"] / 1e9)
            points.append(CostPoint(labels[stem], family_of(models[stem]), task, *facts, cell.mean, cell.spread))
    return points


def cost_means(points: Sequence[CostPoint]) -> list[CostMean]:
    """The points of the paper's Figure 2, by panel and encoder.

    A panel is a mean over those of its tasks that any encoder was scored on; an encoder that lacks one is left out of
    it, as its mean would not compare. A panel without such a task is absent.
    """
    means = []
    for panel, names in PANELS.items():
        tasks = [name for name in names if any(point.task == name for point in points)]
        for encoder in dict.fromkeys(point.encoder for point in points):
            own = {point.task: point for point in points if point.encoder == encoder and point.task in tasks}
            if tasks and len(own) == len(tasks):
                one, mean = own[tasks[0]], float(np.mean([point.mean for point in own.values()]))
                facts = (one.family, one.parameters, one.gflop, one.paper_gmac)
                means.append(CostMean(panel, encoder, *facts, mean, " ".join(tasks)))
    return means


def left_out_of_means(points: Sequence[CostPoint], means: Sequence[CostMean]) -> list[str]:
    """A line for each encoder that was scored on some of a panel's tasks and is not in it."""
    lines = []
    for panel, tasks in {mean.panel: mean.tasks.split() for mean in means}.items():
        shown = {mean.encoder for mean in means if mean.panel == panel}
        own: dict[str, set[str]] = {}
        for point in points:
            if point.task in tasks and point.encoder not in shown:
                own.setdefault(point.encoder, set()).add(point.task)
        for encoder, scored in own.items():
            absent = ", ".join(task for task in tasks if task not in scored)
            lines.append(f"{panel}: {encoder} is left out, as it has no score on {absent}.")
    return lines


# --- drawing ----------------------------------------------------------------------------------------------------------


Links = Mapping[str, str]
"""Name of an encoder, or of a point of a study -> where its points lead in an SVG file."""


def cost_figures(points: Sequence[CostPoint], *, links: Links | None = None) -> dict[str, Figure]:
    """Stem of a file -> figure: ``figure2`` and ``figure2_tasks`` as in ``draw_cost``; none without points."""
    if not points:
        return {}  # the paper's protocol alone
    if means := cost_means(points):
        return {"figure2": cost_means_figure(means, links=links), "figure2_tasks": cost_figure(points, links=links)}
    return {"figure2": cost_figure(points, links=links)}


def cost_means_figure(means: Sequence[CostMean], *, links: Links | None = None) -> Figure:
    """Figure 2 as the paper has it: a panel for types of cells and one for gene expression, one point an encoder.

    Mean over the panel's tasks against GFLOP a cell (true arithmetic, a multiply-add being two); the size of a point
    grows with the logarithm of its parameters, its colour is the family.
    """
    panels = []
    for panel in dict.fromkeys(mean.panel for mean in means):
        own = [mean for mean in means if mean.panel == panel]
        tasks = own[0].tasks.split()
        score = "Pearson correlation" if tasks[0].startswith("hest") else "balanced accuracy"
        panels.append((f"{panel}\nmean of {len(tasks)} task{'s' * (len(tasks) > 1)}", score, own))
    return _figure(panels, links or {})


def cost_figure(points: Sequence[CostPoint], *, links: Links | None = None) -> Figure:
    """The same with a panel a task, and bars of the standard deviation over folds."""
    tasks = sorted({point.task for point in points})
    by_task = [[point for point in points if point.task == task] for task in tasks]
    score = "score (s.d. over folds)"
    return _figure([(short(task), score, own) for task, own in zip(tasks, by_task, strict=True)], links or {})


def _figure(panels: Sequence[tuple[str, str, Sequence[Any]]], links: Links) -> Figure:
    """A panel each of (title, what the score is, CostPoints or CostMeans), and a legend of families and sizes below."""
    figure, axes = panel_grid(len(panels), width=4.6, height=3.7)
    for axis, (title, score, points) in zip(axes, panels, strict=True):
        _panel(axis, points, links)
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(score)
    handles = _legend([point for _, _, points in panels for point in points])
    columns = 8 if len(panels) > 1 else 4
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.draw_without_rendering()  # settles where the panels lie
    for axis, (_, _, points) in zip(axes, panels, strict=True):
        _label(axis, points)
    return figure


def panel_grid(count: int, *, width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure of panels of a size in inches, three in a row, and their axes."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _panel(axis: Any, points: Sequence[Any], links: Links) -> None:
    low, high = log_limits([point.gflop for point in points])
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    for point in points:
        color = family_color(point.family)
        spread = getattr(point, "spread", math.nan)
        if math.isfinite(spread):
            axis.errorbar(point.gflop, point.mean, yerr=spread, fmt="none", color=color, capsize=3, lw=1)
        area = marker_area(point.parameters)
        marker = axis.scatter(point.gflop, point.mean, s=area, color=color, ec="white", lw=0.6, zorder=3)
        marker.set_urls([links.get(point.encoder)])
    axis.set_xlabel("GFLOP a cell")
    axis.margins(y=0.15)
    axis.grid(alpha=0.3)


def log_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of a logarithmic axis with room on both sides; values that are equal lie in the middle."""
    low, high = min(values), max(values)
    room = max(2.0, (high / low) ** 0.2)
    return low / room, high * room


def family_color(family: str) -> str:
    """matplotlib's name of a family's colour; grey for one that the registry does not list."""
    return f"C{FAMILIES.index(family)}" if family in FAMILIES else "0.5"


def marker_area(parameters: int) -> float:
    """Area of a point in square points of print: 30 up to a million parameters, 60 more for each factor of ten."""
    return 30 + 60 * math.log10(max(parameters, 1e6) / 1e6)


def _legend(points: Sequence[Any]) -> list[Line2D]:
    """A point for each family that is shown, and for the powers of ten of parameters of those shown."""

    def handle(label: str, color: str, parameters: int) -> Line2D:
        size = math.sqrt(marker_area(parameters))
        return Line2D([], [], ls="", marker="o", ms=size, color=color, mec="white", label=label)

    shown = {point.family for point in points}
    families = [*(name for name in FAMILIES if name in shown), *sorted(shown - {*FAMILIES})]
    exponents = [math.log10(max(point.parameters, 1e6)) for point in points]
    sizes = range(round(min(exponents)), round(max(exponents)) + 1)
    return [handle(plain(name), family_color(name), 10**7) for name in families] + [
        handle(f"{10 ** (exponent - 6):,} M parameters", "0.75", 10**exponent) for exponent in sizes
    ]


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
_PLACES = [(far * across, far * up) for far in (1, 2) for across, up in _AROUND]
"""Around a point, in the order in which they are tried for its name."""


def _label(axis: Any, points: Sequence[Any]) -> None:
    """Names beside their points, each in the place that runs over the fewest points, names and frames."""
    frame, pixel = axis.get_window_extent(), axis.figure.dpi / 72
    taken = []
    for point in points:
        x, y = axis.transData.transform((point.gflop, point.mean))
        radius = math.sqrt(marker_area(point.parameters)) / 2 * pixel
        taken.append(Bbox.from_extents(x - radius, y - radius, x + radius, y + radius))
    for point in sorted(points, key=lambda point: point.gflop):
        away = math.sqrt(marker_area(point.parameters)) / 2 + 2
        texts = [_name(axis, point, across, up, away=away) for across, up in _PLACES]
        boxes = [text.get_window_extent() for text in texts]
        cost = [box.count_overlaps(taken) + 10 * _outside(box, frame) for box in boxes]
        best = cost.index(min(cost))
        taken.append(boxes[best])
        for place, text in enumerate(texts):
            if place != best:
                text.remove()


def _name(axis: Any, point: Any, across: float, up: float, *, away: float) -> Any:
    side = {1: "left", 0: "center", -1: "right"}[int(np.sign(across))]
    height = {1: "bottom", 0: "center", -1: "top"}[int(np.sign(up))]
    place = {"xytext": (across * away, up * away), "textcoords": "offset points", "ha": side, "va": height}
    text = axis.annotate(plain(point.encoder), (point.gflop, point.mean), fontsize=8, **place)
    text.set_in_layout(False)
    return text


def _outside(box: Bbox, frame: Bbox) -> bool:
    return box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1


def plain(text: str) -> str:
    """A name that matplotlib draws as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def short(task: str) -> str:
    """A task's short name as matplotlib draws it."""
    return plain(task_labels([task])[task])
