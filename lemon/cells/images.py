"""The images of a selection: what a feed reads them from, and all of them in memory."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np

from lemon.cells.select import Part, Selection
from lemon.cells.shard import images_from_arrow
from lemon.errors import ConfigError
from lemon.runtime.shards import ShardError
from lemon.runtime.store import BATCH_ROWS
from lemon.schema import CELL_PX

THREADS = 8


class Images(Protocol):
    """Where a feed reads images from, by the numbers of their cells: their places in a selection."""

    def prepare(self, numbers: np.ndarray) -> None:
        """Say which cells (int64 [N]) will be read: each batch once, in the order of the readings."""

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill uint8 [N, 60, 60, 3], contiguous, with the images of cells (int64 [N])."""

    def forget(self) -> None:
        """Forget what was said to be read and was not."""

    def close(self) -> object:
        """End all readings; let go of files."""


class ImagesInMemory:
    """Images of an array, uint8 [N, 60, 60, 3], a cell's number being its place there."""

    def __init__(self, images: np.ndarray) -> None:
        self._flat = images.reshape(len(images), -1)

    def prepare(self, numbers: np.ndarray) -> None:
        """Nothing."""

    def read(self, numbers: np.ndarray, out: np.ndarray) -> None:
        """Fill uint8 [N, 60, 60, 3], contiguous, with the images of cells (int64 [N])."""
        np.take(self._flat, numbers, axis=0, out=out.reshape(len(out), -1), mode="clip")  # "clip" writes without a copy

    def forget(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_images(selection: Selection) -> np.ndarray:
    """The images of a selection in memory, uint8 [N, 60, 60, 3], by slide, then by rank. Raises ConfigError."""
    images = np.empty((selection.n_cells, CELL_PX, CELL_PX, 3), np.uint8)

    def copy(part: Part, place: int) -> None:
        for block in part_images(selection, part):
            images[place : place + len(block)] = block
            place += len(block)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, selection.parts, selection.starts.tolist()))
    return images


def sample_images(selection: Selection, *, count: int, slides: int = 64) -> np.ndarray:
    """About ``count`` cells of a selection or all where there are fewer, uint8 [N, 60, 60, 3]: the lowest ranks of some
    slides, each a random sample of its slide. Raises ConfigError."""
    parts = selection.parts[:: -(-len(selection.parts) // slides)]
    each = -(-count // len(parts))
    few = (replace(part, n_rows=min(part.n_rows, each)) for part in parts)
    return read_images(Selection(selection.store, tuple(few)))


def part_images(
    selection: Selection, part: Part, *, first: int = 0, last: int | None = None, rows: int = BATCH_ROWS
) -> Generator[np.ndarray]:
    """The images of a part from row ``first`` to ``last`` (exclusive; None: all), uint8 [n <= rows, 60, 60, 3].

    Raises ConfigError where the shard is damaged or another than its table says; of fields as ``field_images`` does.
    """
    try:
        if part.fields is not None:
            from lemon.cells.fields import field_images  # opens slides, which nothing else here needs

            yield from field_images(selection, part, first=first, last=last, rows=rows)
            return
        for batch in selection.batches(part, ["image"], first=first, last=last, batch_rows=rows):
            yield images_from_arrow(batch["image"])
    except ShardError as error:
        raise ConfigError(f"cells: {selection.store.uri}/{error}; curate the slide again") from None


def places_of(selection: Selection, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each cell, and its row there: int64 [N]."""
    parts = np.searchsorted(selection.starts, numbers, "right") - 1
    return parts, numbers - selection.starts[parts]
