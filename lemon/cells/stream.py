"""Images read from the table itself, local or at s3://, a block of a slide at a time: for what no disk holds.

An order (``lemon.cells.order.Stream``) names cells so that those of one block come one after another. For each block
that is in use, one reader is open, which reads a piece ahead of what was taken from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from lemon.cells.images import part_images, places_of
from lemon.cells.order import LANES
from lemon.cells.select import Selection
from lemon.cells.shard import ROW_GROUP_ROWS
from lemon.runtime.limits import allow_open_files
from lemon.schema import CELL_PX

PIECE_ROWS = 32
"""Rows (346 KB) that a reader reads ahead."""

THREADS = 16


class StreamedImages:
    """The images of a selection, read from its shards; ``prepare`` opens the blocks that a later ``read`` needs."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._pool = ThreadPoolExecutor(THREADS, "lemon-stream")
        self._blocks: dict[tuple[int, int], _Block] = {}
        allow_open_files(2 * LANES)  # of two passes

    def prepare(self, numbers: np.ndarray) -> None:
        """Open the blocks of cells (int64 [N]) that will be read."""
        for key, row, _ in self._runs(numbers):
            block = self._blocks.get(key) or self._open(key, row)
            block.uses += 1

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill uint8 [N, 60, 60, 3] with the images of cells (int64 [N]). Raises ConfigError."""
        for key, row, at in self._runs(numbers):
            block = self._blocks.get(key)
            if block is None or row < block.row:
                block = self._open(key, row)
            block.take(row, out[at])
            block.uses -= 1
            if block.uses <= 0:
                self._blocks.pop(key).close()

    def forget(self) -> None:
        """Close all blocks."""
        while self._blocks:
            self._blocks.popitem()[1].close()

    def close(self) -> None:
        """End all readings."""
        self.forget()
        self._pool.shutdown()

    def _runs(self, numbers: np.ndarray) -> Iterator[tuple[tuple[int, int], int, slice]]:
        """Cells that follow one another in a block: (part, number of the block), first row, where they are asked."""
        parts, rows = places_of(self._selection, numbers)
        blocks = rows // ROW_GROUP_ROWS
        breaks = (np.diff(numbers) != 1) | (np.diff(blocks) != 0) | (np.diff(parts) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(numbers)]
        for first, last in pairwise(edges):
            yield (int(parts[first]), int(blocks[first])), int(rows[first]), slice(first, last)

    def _open(self, key: tuple[int, int], row: int) -> _Block:
        uses = 0
        if key in self._blocks:
            before = self._blocks.pop(key)
            uses = before.uses
            before.close()
        part = self._selection.parts[key[0]]
        last = min((key[1] + 1) * ROW_GROUP_ROWS, part.n_rows)
        pieces = part_images(self._selection, part, first=row, last=last, rows=PIECE_ROWS)
        block = self._blocks[key] = _Block(self._pool, pieces, row, uses)
        return block


class _Block:
    """One block's images from a row on, in order, a piece ahead."""

    def __init__(self, pool: ThreadPoolExecutor, pieces: Generator[np.ndarray], row: int, uses: int) -> None:
        self._pool, self._pieces, self.row, self.uses = pool, pieces, row, uses
        self._piece = np.empty((0, CELL_PX, CELL_PX, 3), np.uint8)
        self._next: Future[np.ndarray] = pool.submit(next, pieces)

    def take(self, row: int, out: np.ndarray) -> None:
        """Fill uint8 [n, 60, 60, 3] from ``row`` on, which is not before what was taken."""
        skip = row - self.row
        self.row = row + len(out)
        while len(out):
            if skip >= len(self._piece):
                skip -= len(self._piece)
                self._piece = self._next.result()
                self._next = self._pool.submit(next, self._pieces, self._piece[:0])
                continue
            piece = self._piece[skip : skip + len(out)]
            out[: len(piece)] = piece
            out = out[len(piece) :]
            self._piece, skip = self._piece[skip + len(piece) :], 0

    def close(self) -> None:
        """Wait for what is being read, and close the file."""
        if not self._next.cancel():
            with contextlib.suppress(Exception):  # of a piece that nobody needs
                self._next.result()
        self._pieces.close()
