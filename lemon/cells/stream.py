"""Images read from the table itself, local or at s3://, a block of a slide at a time: for what no disk holds.

An order (``lemon.cells.order.Stream``) names cells so that those of one block come one after another. For each block
that is in use, one reader is open, which reads a piece ahead of what was taken from it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
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

_Place = tuple[int, int, int]
"""A part of the selection, a block of it, and a row. Two readers may be in one block, where a lane ends in it and
another begins."""


class StreamedImages:
    """The images of a selection, read from its shards; ``prepare`` opens the blocks that a later ``read`` needs."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._pool = ThreadPoolExecutor(THREADS, "lemon-stream")
        self._announced: defaultdict[_Place, list[_Reader]] = defaultdict(list)  # by where they will have read to
        self._open: defaultdict[_Place, list[_Reader]] = defaultdict(list)  # by where they have read to
        allow_open_files(2 * LANES)  # of two passes

    def prepare(self, numbers: np.ndarray) -> None:
        """Open the blocks of cells (int64 [N]) that will be read."""
        for place, count, _ in self._runs(numbers):
            reader = _first(self._announced, place)
            if reader is None:
                reader = self._reader(place)
                self._open[place].append(reader)
            reader.uses += 1
            self._announced[_after(place, count)].append(reader)

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill uint8 [N, 60, 60, 3] with the images of cells (int64 [N]). Raises ConfigError."""
        for place, count, at in self._runs(numbers):
            reader = _first(self._open, place) or self._reader(place)
            reader.take(out[at])
            reader.uses -= 1
            if reader.uses > 0:
                self._open[_after(place, count)].append(reader)
            else:
                _first(self._announced, _after(place, count), of=reader)
                reader.close()

    def forget(self) -> None:
        """Close all blocks."""
        self._announced.clear()
        while self._open:
            for reader in self._open.popitem()[1]:
                reader.close()

    def close(self) -> None:
        """End all readings."""
        self.forget()
        self._pool.shutdown()

    def _runs(self, numbers: np.ndarray) -> Iterator[tuple[_Place, int, slice]]:
        """Cells that follow one another in a block: where they begin, how many they are, where they are asked."""
        parts, rows = places_of(self._selection, numbers)
        blocks = rows // ROW_GROUP_ROWS
        breaks = (np.diff(numbers) != 1) | (np.diff(blocks) != 0) | (np.diff(parts) != 0)
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(numbers)]
        for first, last in pairwise(edges):
            yield (int(parts[first]), int(blocks[first]), int(rows[first])), last - first, slice(first, last)

    def _reader(self, place: _Place) -> _Reader:
        part, block, row = self._selection.parts[place[0]], *place[1:]
        last = min((block + 1) * ROW_GROUP_ROWS, part.n_rows)
        return _Reader(self._pool, part_images(self._selection, part, first=row, last=last, rows=PIECE_ROWS))


def _after(place: _Place, count: int) -> _Place:
    return place[0], place[1], place[2] + count


def _first(readers: dict[_Place, list[_Reader]], place: _Place, *, of: _Reader | None = None) -> _Reader | None:
    """Take out the first reader at a place, or the one named; None where there is none."""
    there = readers.get(place, [])
    taken = next((reader for reader in there if of is None or reader is of), None)
    if taken is not None:
        there.remove(taken)
    if not there:
        readers.pop(place, None)
    return taken


class _Reader:
    """A block's images from a row on, in order, a piece ahead; ``uses`` are the times that it will be asked."""

    def __init__(self, pool: ThreadPoolExecutor, pieces: Generator[np.ndarray]) -> None:
        self._pool, self._pieces, self.uses = pool, pieces, 0
        self._piece = np.empty((0, CELL_PX, CELL_PX, 3), np.uint8)
        self._next: Future[np.ndarray] = pool.submit(next, pieces)

    def take(self, out: np.ndarray) -> None:
        """Fill uint8 [n, 60, 60, 3] with the next images."""
        while len(out):
            if not len(self._piece):
                self._piece = self._next.result()
                self._next = self._pool.submit(next, self._pieces, self._piece[:0])
            taken = min(len(self._piece), len(out))
            out[:taken] = self._piece[:taken]
            out, self._piece = out[taken:], self._piece[taken:]

    def close(self) -> None:
        """Wait for what is being read, and close the file."""
        if not self._next.cancel():
            with contextlib.suppress(Exception):  # of a piece that nobody needs
                self._next.result()
        self._pieces.close()
