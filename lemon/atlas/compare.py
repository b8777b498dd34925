"""Two encoders of the same cells: how far their neighbours agree, and the cells on which they disagree most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
from sklearn.neighbors import NearestNeighbors

from lemon.atlas.cells import AtlasCells
from lemon.atlas.fields import Measure
from lemon.cells.sheet import draw_sheet
from lemon.embed.stream import directions
from lemon.runtime.store import Store

CELLS, SHEET = "disagree.csv", "disagree.png"

ON_SHEET = 100


def neighbour_overlap(first: np.ndarray, second: np.ndarray, *, k: int = 20) -> np.ndarray:
    """Share of the ``k`` nearest cells, by cosine, that two embeddings have in common: float32 [N] in [0, 1].

    Exact: every cell is compared with every other, which takes N^2 steps. Unrelated embeddings share k / (N - 1).

    Args:
        first, second: vectors [N, D] and [N, E] of the same cells.
        k: neighbours of each cell, itself left out; fewer where there are not as many.

    Raises ValueError where they are of different numbers of cells, or of fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"got vectors of {len(first)} and {len(second)} cells; expected two or more of the same cells")
    near, others = (nearest_cells(vectors, k=k) for vectors in (first, second))
    # Of two sorted rows put together, a cell that is in both stands twice in a row.
    both = np.sort(np.concatenate([near, others], axis=1), axis=1)
    common = (both[:, 1:] == both[:, :-1]).sum(axis=1)
    return (common / near.shape[1]).astype(np.float32)


def nearest_cells(vectors: np.ndarray, *, k: int) -> np.ndarray:
    """The ``k`` cells nearest to each by cosine, itself left out, the nearest first: int64 [N, k]."""
    search = NearestNeighbors(n_neighbors=min(k, len(vectors) - 1), algorithm="brute").fit(directions(vectors))
    found: np.ndarray = search.kneighbors(return_distance=False)  # Euclidean distance of directions orders as cosine
    return found


@dataclass(frozen=True)
class Comparison:
    """The overlap of each cell float32 [N], by ``k`` neighbours, of two models."""

    overlap: np.ndarray
    k: int
    models: tuple[str, str]

    @property
    def told(self) -> str:
        """What was found, in a line; the spread is over cells."""
        low, high = np.percentile(self.overlap, (5, 95))
        chance = min(self.k / (len(self.overlap) - 1), 1)
        spread = f"standard deviation {self.overlap.std():.2f}, 5 % to 95 % of cells {low:.2f} to {high:.2f}"
        found = f"have {self.overlap.mean():.2f} of a cell's {self.k} nearest in common"
        return f"{self.models[0]} and {self.models[1]} {found} ({spread}; by chance {chance:.3f})"

    @property
    def measure(self) -> Measure:
        """As a field of the page."""
        return Measure("overlap", f"Common of {self.k} nearest", "", 0, 1, self.overlap)


def write_comparison(store: Store, cells: AtlasCells, comparison: Comparison) -> None:
    """Write disagree.csv, all cells with their overlap, the least first, and disagree.png, the first ON_SHEET."""
    order = np.argsort(comparison.overlap, kind="stable")
    table = cells.table.select(["cell_id", "slide_id", "x_level0_px", "y_level0_px"])
    column = pa.array(comparison.overlap)
    with store.write(CELLS) as stream:
        pyarrow.csv.write_csv(table.append_column(f"common_of_{comparison.k}", column).take(order), stream)
    shown = order[:ON_SHEET]
    captions = [f"{comparison.overlap[cell]:.2f}" for cell in shown]
    store.write_bytes(SHEET, draw_sheet([cells.thumbnails[cell] for cell in shown], captions))
