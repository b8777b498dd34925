"""Neighbours for the served page: by the index of ``lemon find`` where there is one, else by looking at every cell."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from lemon.atlas.served import Served
from lemon.embed.read import Embeddings
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError

if TYPE_CHECKING:
    from lemon.find.index import NeighbourIndex

MOST_NEIGHBOURS = 1000

BLOCK = 1 << 15  # cells that are compared at once


class Neighbours:
    """The cells of a served atlas that are nearest to one of them by embedding.

    Args:
        served: the atlas; its vectors are mapped, a block at a time is in memory.
        embeddings, index: of all cells that were embedded, where an index of them is there.
    """

    def __init__(
        self, served: Served, *, embeddings: Embeddings | None = None, index: NeighbourIndex | None = None
    ) -> None:
        self._weights = np.array(served.facts["weights"], np.float32)
        self._vectors = served.mapped("vectors", "i1").reshape(served.count, len(self._weights))
        self._slides = served.mapped("slide", "<u4")
        self._rows, self._names = served.rows, [row.slide_id for row in served.slides]
        self._lock = threading.Lock()  # one search at a time: each takes all cores, and memory of its own
        self._embeddings, self._index = embeddings, index
        if index is not None:
            self._cell_of = self._cells_by_row()

    def of(self, cell: int, wanted: int) -> np.ndarray:
        """The ``wanted`` cells nearest to one, itself left out, the nearest first: int64 [K]."""
        with self._lock:
            found = None if self._index is None else self._by_index(cell, wanted)
            return self.exact(cell, wanted) if found is None else found

    def exact(self, cell: int, wanted: int) -> np.ndarray:
        """By comparing with every cell: the squared distance of principal components of the embeddings."""
        own = self._vectors[cell].astype(np.float32)
        cells, distances = np.empty(0, np.int64), np.empty(0, np.float32)
        for start in range(0, len(self._vectors), BLOCK):
            differences = self._vectors[start : start + BLOCK].astype(np.float32)
            differences -= own
            differences *= differences
            distances = np.concatenate([distances, differences @ self._weights])
            cells = np.concatenate([cells, np.arange(start, start + len(differences))])
            if len(distances) > wanted + 1:
                kept = np.argpartition(distances, wanted)[: wanted + 1]
                cells, distances = cells[kept], distances[kept]
        order = np.argsort(distances, kind="stable")
        return cells[order][cells[order] != cell][:wanted]

    def _by_index(self, cell: int, wanted: int) -> np.ndarray | None:
        """By the index; None where it finds too few cells of this atlas, or embeddings are no longer there."""
        assert self._index is not None
        assert self._embeddings is not None
        place = self._names[int(self._slides[cell])], int(self._rows[cell])
        share = len(self._vectors) / self._embeddings.n_cells
        try:
            vector = vectors_of(self._embeddings.row(*place)["embedding"]).astype(np.float32)
        except ConfigError:
            return None
        (hits,) = self._index.search(vector, k=int(1.5 * (wanted + 1) / share) + 1)
        cells = [self._cell_of[hit.slide_id][hit.row] for hit in hits if self._is_here(hit.slide_id, hit.row)]
        near = np.array([each for each in cells if each != cell][:wanted], np.int64)
        return near if len(near) == min(wanted, len(self._vectors) - 1) else None

    def _is_here(self, slide_id: str, row: int) -> bool:
        return slide_id in self._cell_of and row < len(self._cell_of[slide_id]) and self._cell_of[slide_id][row] >= 0

    def _cells_by_row(self) -> dict[str, np.ndarray]:
        """Cells by their row, of each slide, -1 for none: an atlas has the first rows of each, and single others."""
        found = {}
        for number, name in enumerate(self._names):
            cells = np.flatnonzero(self._slides == number)
            of = np.full(self._rows[cells].max(initial=-1) + 1, -1, np.int64)
            of[self._rows[cells]] = cells
            found[name] = of
        return found
