"""Orders of cells: every pass has each cell once, from any position, in little memory and time."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.cells.order import Order, Permutation, Stream, permuted, slide_distance

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=12).map(tuple)


def stream(
    sizes: tuple[int, ...] = (3000, 10, 2500, 4096), *, seed: int = 1, batch: int = 64, lanes: int = 8
) -> Stream:
    return Stream(sizes, seed=seed, batch=batch, lanes=lanes)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_a_keyed_permutation_has_every_place_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permuted(np.arange(n), n, key=(key,))), np.arange(n))


@given(n=st.integers(1, 2**62), key=st.integers(0, 2**63 - 1), places=st.lists(st.integers(0, 2**62), max_size=20))
@settings(max_examples=60, deadline=None)
def test_places_of_a_huge_permutation_stay_in_it_and_differ(n: int, key: int, places: list[int]) -> None:
    chosen = np.unique(np.array(places, np.int64) % n)
    found = permuted(chosen, n, key=(key,))
    assert ((found >= 0) & (found < n)).all()
    assert len(np.unique(found)) == len(chosen)


def test_keyed_permutations_take_each_place_to_all_places_alike() -> None:
    n, keys = 12, 1000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permuted(np.arange(n), n, key=(key,))] += 1
    expected = keys / n
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_permutation_leaves_no_trace_of_the_order_of_its_places() -> None:
    found = permuted(np.arange(100_000), 100_000, key=(3,))
    assert abs(np.corrcoef(np.arange(100_000), found)[0, 1]) < 0.02
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02
    assert (np.diff(found) == 1).sum() < 20


@given(sizes=SIZES, seed=st.integers(0, 9), batch=st.integers(1, 700), lanes=st.integers(1, 40), turn=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_each_pass_of_a_stream_has_every_cell_once(
    sizes: tuple[int, ...], seed: int, batch: int, lanes: int, turn: int
) -> None:
    order = stream(sizes, seed=seed, batch=batch, lanes=lanes)
    cells = order.indices(turn * sum(sizes), sum(sizes))
    assert np.array_equal(np.sort(cells), np.arange(sum(sizes)))


ORDERS: list[Order] = [Permutation(9606, seed=1), stream()]


@pytest.mark.parametrize("order", ORDERS)
def test_any_part_of_an_order_is_found_by_itself(order: Order) -> None:
    whole = order.indices(0, 3 * order.n_cells)
    random = np.random.default_rng(0)
    for start in random.integers(0, 2 * order.n_cells, 40):
        count = int(random.integers(0, order.n_cells))
        assert np.array_equal(order.indices(int(start), count), whole[start : start + count])


@pytest.mark.parametrize("make", [lambda seed: Permutation(5000, seed), lambda seed: stream((100,) * 50, seed=seed)])
def test_passes_and_seeds_differ(make: Callable[[int], Order]) -> None:
    first, other = make(1), make(2)
    cells = first.indices(0, 5000)
    assert np.array_equal(cells, make(1).indices(0, 5000))
    assert (cells != other.indices(0, 5000)).mean() > 0.9
    assert (cells != first.indices(5000, 5000)).mean() > 0.9


def test_an_order_of_few_cells_goes_on_for_ever() -> None:
    assert len(Permutation(7, seed=0).indices(3, 40)) == len(stream((4, 3)).indices(3, 40)) == 40


def test_a_batch_of_a_stream_is_of_many_slides_and_runs_of_their_cells_by_rank() -> None:
    order = stream((4096,) * 100, batch=256, lanes=64)
    for step in range(20):
        cells = order.indices(256 * step, 256)
        assert len(np.unique(cells // 4096)) > 30
        assert len(np.unique(cells // 2048)) <= 2 * 64
        assert (np.diff(cells) == 1).mean() > 0.7


@pytest.mark.parametrize("world", [2, 4, 8])
def test_workers_of_a_stream_read_different_blocks(world: int) -> None:
    order = stream((4096,) * 100, batch=256, lanes=64)
    share = 256 // world
    blocks = [
        {int(cell) // 2048 for step in range(30) for cell in order.indices(256 * step + rank * share, share)}
        for rank in range(world)
    ]
    together = set().union(*blocks)
    assert sum(map(len, blocks)) <= len(together) + world, "but for those that lie on both sides of a border"


@pytest.mark.parametrize("order", ["uniform", "stream"])
def test_an_order_of_500_million_cells_starts_within_a_second_and_holds_megabytes(order: str) -> None:
    sizes = (50_000,) * 10_000
    tracemalloc.start()
    start = time.perf_counter()
    made = Permutation(sum(sizes), seed=0) if order == "uniform" else Stream(sizes, seed=0, batch=4096)
    cells = made.indices(made.n_cells - 2048, 4096)
    seconds = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(cells)) > 4000
    assert seconds < 1
    assert peak < 100e6


def test_the_distance_of_slides_is_that_of_their_shares() -> None:
    sizes = (10, 30, 60)
    assert slide_distance(np.arange(100), sizes) == 0
    assert slide_distance(np.arange(10), sizes) == pytest.approx(0.9)
    assert slide_distance(np.array([0, 10, 11, 40, 41, 42]), sizes) == pytest.approx(1 / 6 - 0.1 + 1 / 3 - 0.3)
