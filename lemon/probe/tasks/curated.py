"""Cells of one's own table for tasks that need no labels: images, ids, and the groups that folds never divide."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from lemon.cells.select import Part, select_cells
from lemon.cells.shard import images_from_arrow
from lemon.errors import ConfigError
from lemon.probe.folds import N_FOLDS
from lemon.probe.task import Count, TaskError
from lemon.runtime.shards import ShardError
from lemon.runtime.store import BATCH_ROWS, READERS, Store

BLOCK_UM = 250.0
_COLUMNS = ["cell_id", "slide_id", "x_level0_px", "y_level0_px", "mpp", "image"]


@dataclass(frozen=True)
class CuratedCells:
    """The cells of lowest rank of a table: ``rows`` has a row a cell, of ``n_slides`` slides."""

    rows: pa.Table
    n_slides: int

    @property
    def images(self) -> np.ndarray:
        """uint8 [N, 60, 60, 3]."""
        return np.array(images_from_arrow(self.rows["image"]))

    @property
    def cell_ids(self) -> np.ndarray:
        """str [N]."""
        return np.array(self.rows["cell_id"].to_pylist(), str)

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """``slide`` and ``block``, a square of 250 um with its slide: str [N] each."""
        place = [self.rows[name].to_numpy() * self.rows["mpp"].to_numpy() for name in ("x_level0_px", "y_level0_px")]
        square = np.floor(np.stack(place, axis=1) / BLOCK_UM).astype(int)
        slides = self.rows["slide_id"].to_pylist()
        blocks = [f"{slide}_{x}_{y}" for slide, (x, y) in zip(slides, square, strict=True)]
        return {"slide": np.array(slides, str), "block": np.array(blocks, str)}

    @property
    def cluster(self) -> str:
        """The group that is never divided: the slide where there are five or more, else the square of 250 um."""
        return "slide" if self.n_slides >= N_FOLDS else "block"

    @property
    def counts(self) -> tuple[Count, ...]:
        """For the table of counts."""
        return Count("slides", self.n_slides), Count("squares of 250 um", len(np.unique(self.groups["block"])))


def read_cells(folder: str, *, task: str, n_cells: int, columns: Sequence[str] = ()) -> CuratedCells:
    """The ``n_cells`` cells of lowest rank of a cells table, all where there are fewer, with further columns.

    Raises TaskError, in a line that begins with ``task``, where there are none.
    """
    try:
        selection = select_cells(Store(folder), n_cells=n_cells)
    except ConfigError as error:
        raise TaskError(f"{task}: {error}") from None
    names = [*_COLUMNS, *columns]

    def lowest(part: Part) -> list[pa.RecordBatch]:
        # No more is read than the rows that are kept: a table may have 10,000 slides, each of hundreds of MB.
        return list(selection.batches(part, names, batch_rows=min(part.n_rows, BATCH_ROWS)))

    try:
        with ThreadPoolExecutor(READERS) as pool:
            batches = [batch for of_slide in pool.map(lowest, selection.parts) for batch in of_slide]
    except ShardError as error:
        raise TaskError(f"{task}: {folder}/{error}; curate the slide again") from None
    return CuratedCells(pa.Table.from_batches(batches), len(selection.parts))
