"""The paper's Figure 4: a map of cells coloured by cluster, beside the cells themselves, placed by the map."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lemon.atlas.fields import MISSING, MISSING_COLOR, Category
from lemon.atlas.projection import nearest_in_squares
from lemon.runtime.secrets import redacted
from lemon.runtime.store import Store

EDGE_PX = 3  # of a square's frame, in the colour of its cell's category
MAX_LISTED = 12

_INCHES = 8.0  # the longer side of a panel


def draw_atlas(
    store: Store, *, unit: np.ndarray, thumbnails: np.ndarray, category: Category | None, squares: int, title: str
) -> list[str]:
    """Write atlas.png and atlas.svg (points and cells are a picture within it, text is text); returns their names.

    Args:
        store: the output.
        unit: positions in the unit square, y downwards [N, 2].
        thumbnails: uint8 [N, P, P, 3].
        category: what colours the points; None: grey.
        squares: of cell images a side.
        title: heading.
    """
    low = np.floor(unit.min(axis=0) * squares) / squares - 0.005  # whole squares
    high = np.ceil(unit.max(axis=0) * squares) / squares + 0.005
    width, height = (high - low) * _INCHES / (high - low).max()
    figure = Figure(figsize=(2 * max(width, 3) + 0.5, height + 1.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis in (left, right):
        axis.set_axis_off()
    colors = np.full((len(unit), 3), 110, np.uint8) if category is None else colors_of(category)
    points = np.clip(72 * height * width / np.sqrt(len(unit)) / 8, 1, 4) ** 2
    left.scatter(*unit.T, c=colors / 255, s=points, linewidths=0, rasterized=True)
    left.set_title("" if category is None else f"by {category.title.lower()}", fontsize=12)
    right.imshow(grid_of_cells(unit, thumbnails, colors=colors, squares=squares), extent=(0, 1, 1, 0))
    right.set_title("the cell nearest the centre of each square", fontsize=12)
    for axis in (left, right):
        axis.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal")
    if category is not None:
        _legend(figure, category)
    figure.suptitle(redacted(title), fontsize=15, parse_math=False)
    for suffix in ("png", "svg"):
        with store.write(f"atlas.{suffix}") as stream:
            figure.savefig(stream, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
    return ["atlas.png", "atlas.svg"]


def grid_of_cells(unit: np.ndarray, thumbnails: np.ndarray, *, colors: np.ndarray, squares: int) -> np.ndarray:
    """Cell images placed by the map, uint8 [squares * (P + 2 EDGE_PX), same, 3]; white where no cell lies."""
    pitch = thumbnails.shape[1] + 2 * EDGE_PX
    sheet = np.full((squares, pitch, squares, pitch, 3), 255, np.uint8)
    chosen = nearest_in_squares(unit, squares=squares)
    for row, column in np.argwhere(chosen >= 0):
        cell = chosen[row, column]
        sheet[row, 1:-1, column, 1:-1] = colors[cell]  # a white line stays between squares
        sheet[row, EDGE_PX:-EDGE_PX, column, EDGE_PX:-EDGE_PX] = thumbnails[cell]
    return sheet.reshape(squares * pitch, squares * pitch, 3)


def colors_of(category: Category) -> np.ndarray:
    """Red, green, blue of each cell: uint8 [N, 3]."""
    table = np.array([*category.colors, MISSING_COLOR], np.uint8)
    return table[np.where(category.codes == MISSING, len(category.colors), category.codes)]


def _legend(figure: Figure, category: Category) -> None:
    counts = np.bincount(category.codes[category.codes != MISSING], minlength=len(category.names))
    marks = []
    for name, color, count in list(zip(category.names, category.colors, counts, strict=True))[:MAX_LISTED]:
        # A dollar sign would begin a formula.
        text = f"{name} ({count:,})".replace("$", r"\$")
        marks.append(Line2D([], [], color="#{:02x}{:02x}{:02x}".format(*color), marker="o", linestyle="", label=text))
    more = len(category.names) - MAX_LISTED
    title = category.title + (f" ({more} more not listed)" if more > 0 else "")
    figure.legend(handles=marks, loc="outside lower center", ncols=6, fontsize=10, frameon=False, title=title)
