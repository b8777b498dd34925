"""The order in which cells are seen: pass after pass without end, fixed by a seed, from any position, in little memory.

A cell is named by its number: its place among the cells of a selection, by slide, then by rank. An order is a function
of positions, so a run goes on at any step, and any worker finds its share by itself. Position ``p`` lies in pass
``p // n_cells``; each pass has every cell once. An epoch is a number of images, not a pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lemon.cells.shard import ROW_GROUP_ROWS

LANES = 512
"""Blocks of a slide's cells that a stream has open at once: a batch is a mixture of as many."""

_ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64


class Order(Protocol):
    """Which cell is at which position."""

    @property
    def n_cells(self) -> int:
        """Cells of a pass."""

    def indices(self, start: int, count: int) -> np.ndarray:
        """Numbers of the cells at positions ``start`` to ``start + count``: int64 [count]."""


def permuted(places: np.ndarray, n: int, *, key: Sequence[int]) -> np.ndarray:
    """Where a keyed permutation of 0 to n - 1 takes some places: int64 of their shape. No table is made.

    A Feistel network over pairs of digits to the base ceil(sqrt(n)); what falls outside of n is permuted again until it
    falls inside (cycle walking; Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The base is so close
    that hardly any place does.

    Args:
        places: int [...], each in [0, n).
        n: 1 to 2**62.
        key: whole numbers >= 0; every one gives another permutation.
    """
    base = np.uint64(math.isqrt(n - 1) + 1)
    keys = np.random.SeedSequence(list(key)).generate_state(_ROUNDS, np.uint64)
    moved = np.asarray(places).astype(np.uint64)
    outside = np.ones(moved.shape, bool)
    while outside.any():
        left, right = np.divmod(moved[outside], base)
        for round_key in keys:
            left, right = right, (left + _mixed(right + round_key)) % base
        moved[outside] = left * base + right
        outside = moved >= n
    return moved.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A hash below 2**32, so that sums with it stay in 64 bits: the upper half of SplitMix64's last steps."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        values = (values ^ (values >> np.uint64(shift))) * multiplier
    return values >> np.uint64(32)


@dataclass(frozen=True)
class Permutation:
    """A uniform order: any cell may follow any other. For images that can be read one by one."""

    n_cells: int
    seed: int

    def indices(self, start: int, count: int) -> np.ndarray:
        """Numbers of the cells at positions ``start`` to ``start + count``: int64 [count]."""
        return _by_pass(self.n_cells, start, count, self._of_pass)

    def _of_pass(self, turn: int, places: np.ndarray) -> np.ndarray:
        return permuted(places, self.n_cells, key=(self.seed, turn))


@dataclass(frozen=True, eq=False)
class Stream:
    """An order for images that are read a block of a slide at a time, from start to end.

    Blocks come in a random order, cut into lanes of one length, and a batch takes equally many cells of each lane, one
    after another. A slide's cells are in rank order, which is random, so a block is a random sample of its slide, and
    all that distinguishes this order from a uniform one is that a batch is a mixture of ``lanes`` blocks. A share of a
    batch is that of some lanes, so workers read different blocks.

    Args:
        sizes: cells of each slide.
        seed: of the order.
        batch: cells of all workers together in a step.
        lanes: at most; fewer where there are fewer blocks, or cells in a batch.
    """

    sizes: tuple[int, ...]
    seed: int
    batch: int
    lanes: int = LANES

    @functools.cached_property
    def n_cells(self) -> int:
        """Cells of a pass."""
        return sum(self.sizes)

    def indices(self, start: int, count: int) -> np.ndarray:
        """Numbers of the cells at positions ``start`` to ``start + count``: int64 [count]."""
        return _by_pass(self.n_cells, start, count, self._of_pass)

    def _of_pass(self, turn: int, places: np.ndarray) -> np.ndarray:
        firsts, widths, starts = self._lanes
        repeat, offset = np.divmod(places, self.batch)
        lane = offset * len(widths) // self.batch
        in_turn = starts[lane] + repeat * widths[lane] + offset - firsts[lane]  # among the cells of the blocks in turn
        blocks, ends = _shuffled_blocks(self, turn)
        block = np.searchsorted(ends, in_turn, "right")
        return self._blocks[blocks[block], 0] + in_turn - (ends[block] - self._blocks[blocks[block], 1])

    @functools.cached_property
    def _blocks(self) -> np.ndarray:
        """Number of the first cell and cells of each block: int64 [B, 2]."""
        sizes = np.array(self.sizes, np.int64)
        counts = -(-sizes // ROW_GROUP_ROWS)
        slide = np.repeat(np.arange(len(sizes)), counts)
        begin = (np.arange(len(slide)) - (counts.cumsum() - counts)[slide]) * ROW_GROUP_ROWS
        first = (sizes.cumsum() - sizes)[slide] + begin
        return np.stack([first, np.minimum(ROW_GROUP_ROWS, sizes[slide] - begin)], axis=1)

    @functools.cached_property
    def _lanes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each lane's first place in a batch, its cells in one, and its start among the cells in turn: int64 [L]."""
        count = min(self.lanes, self.batch, len(self._blocks))
        edges = -(-np.arange(count + 1) * self.batch // count)
        widths = np.diff(edges)
        full, rest = divmod(self.n_cells, self.batch)
        lengths = full * widths + np.clip(rest - edges[:-1], 0, widths)
        return edges[:-1], widths, lengths.cumsum() - lengths


@functools.lru_cache(maxsize=2)
def _shuffled_blocks(stream: Stream, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """A pass' blocks in turn, and where each ends among all cells in turn: int64 [B]."""
    blocks = permuted(np.arange(len(stream._blocks)), len(stream._blocks), key=(stream.seed, turn))
    return blocks, stream._blocks[blocks, 1].cumsum()


def _by_pass(n_cells: int, start: int, count: int, of_pass: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Cells at some positions, from those at places of a pass."""
    if not count:
        return np.empty(0, np.int64)
    turns, places = np.divmod(np.arange(start, start + count), n_cells)
    return np.concatenate([of_pass(turn, places[turns == turn]) for turn in range(turns[0], turns[-1] + 1)])


def slide_distance(numbers: np.ndarray, sizes: Sequence[int]) -> float:
    """How far the slides of some cells are from those of all: the total variation distance, from 0 (alike) to 1.

    Args:
        numbers: int [N], of the cells.
        sizes: cells of each slide.
    """
    counts = np.array(sizes)
    seen = np.bincount(np.searchsorted(counts.cumsum(), numbers, "right"), minlength=len(counts))
    return float(np.abs(seen / len(numbers) - counts / counts.sum()).sum() / 2)
