from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemon.cells.batches import Feed, is_streamed, open_images
from lemon.cells.cache import CachedImages
from lemon.cells.images import ImagesInMemory
from lemon.cells.order import Permutation, Stream
from lemon.cells.select import Selection, select_cells
from lemon.cells.stream import StreamedImages
from tests.cells_table import numbered, numbers_of, small_table

CPU = torch.device("cpu")
N = 150


def feed(count: int = N, *, batch: int = 20, **options: object) -> Feed:
    images = ImagesInMemory(numbered(count))
    return Feed(images, Permutation(count, seed=7), batch=batch, device=CPU, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    return select_cells(small_table(tmp_path_factory.mktemp("feed") / "cells")[0])


@pytest.fixture(params=["cache", "stream"])
def fed(request: pytest.FixtureRequest, selection: Selection, tmp_path: Path) -> Iterator[Feed]:
    """A feed of a table with 150 cells."""
    cache_gb = 1 if request.param == "cache" else 0
    images, order = open_images(selection, cache=tmp_path / "cache", cache_gb=cache_gb, seed=7, batch=20)
    made = Feed(images, order, batch=20, device=CPU)
    yield made
    made.close()


def test_what_the_cache_may_not_hold_is_streamed(selection: Selection, tmp_path: Path) -> None:
    size = N * 10_808 / 1e9
    assert not is_streamed(selection, cache_gb=size)
    assert is_streamed(selection, cache_gb=size - 1e-9)
    images, order = open_images(selection, cache=tmp_path, cache_gb=size, seed=0, batch=4)
    assert isinstance(images, CachedImages)
    assert isinstance(order, Permutation)
    images.close()
    images, order = open_images(selection, cache=tmp_path / "unused", cache_gb=0, seed=0, batch=4)
    assert isinstance(images, StreamedImages)
    assert isinstance(order, Stream)
    assert not (tmp_path / "unused").exists()
    images.close()


def test_the_cache_and_memory_feed_the_same_batches_at_the_same_order(selection: Selection, tmp_path: Path) -> None:
    from lemon.cells.images import read_images

    cached = Feed(CachedImages(selection, cache=tmp_path, cache_gb=1), Permutation(N, seed=7), batch=20, device=CPU)
    memory = Feed(ImagesInMemory(read_images(selection)), Permutation(N, seed=7), batch=20, device=CPU)
    for one, other in zip(cached.batches(0, 20), memory.batches(0, 20), strict=True):
        assert torch.equal(one, other)
    cached.close()


@pytest.mark.parametrize("resident", [True, False])
def test_batches_follow_the_order_and_go_on_at_any_step(resident: bool) -> None:
    whole = [numbers_of(batch) for batch in feed(resident=resident).batches(0, 9)]
    assert whole == [Permutation(N, seed=7).indices(20 * step, 20).tolist() for step in range(9)]
    assert [numbers_of(batch) for batch in feed(resident=resident).batches(4, 9)] == whole[4:]


def test_a_feed_goes_on_at_any_step_with_the_same_rest(fed: Feed) -> None:
    whole = [numbers_of(batch) for batch in fed.batches(0, 40)]
    for step in (0, 1, 7, 13, 29, 39):
        assert [numbers_of(batch) for batch in fed.batches(step, 40)] == whole[step:]


def test_every_pass_of_a_feed_has_every_image_once(fed: Feed) -> None:
    images = list(itertools.chain.from_iterable(numbers_of(batch) for batch in fed.batches(0, 15)))
    assert sorted(images[:N]) == sorted(images[N:]) == list(range(N))


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 20), batch=st.integers(1, 60), step=st.integers(0, 30))
def test_the_batch_of_all_workers_together_does_not_depend_on_their_number(world: int, batch: int, step: int) -> None:
    for order in (Permutation(N, seed=7), Stream((40, 50, 60), seed=7, batch=batch)):
        shares = [
            Feed(ImagesInMemory(numbered(1)), order, batch=batch, device=CPU, rank=rank, world=world)._indices(step)
            for rank in range(world)
        ]
        assert len({len(share) for share in shares}) == 1
        together = np.concatenate(shares)
        assert np.array_equal(together[:batch], order.indices(step * batch, batch))
        assert len(together) - batch < world


@pytest.mark.parametrize("world", [2, 3])
def test_workers_of_a_table_make_up_the_global_batch(selection: Selection, fed: Feed, world: int) -> None:
    alone = [numbers_of(batch) for batch in fed.batches(0, 10)]
    shares = []
    for rank in range(world):
        images = StreamedImages(selection) if isinstance(fed.images, StreamedImages) else fed.images
        share = Feed(images, fed.order, batch=20, device=CPU, rank=rank, world=world)
        shares.append([numbers_of(batch) for batch in share.batches(0, 10)])
    for batch, *parts in zip(alone, *shares, strict=True):
        assert list(itertools.chain(*parts))[:20] == batch


def test_a_consumer_that_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    stream = feed().batches(0, 1000)
    next(stream)
    stream.close()
    assert threading.active_count() <= before  # one of an earlier test may end meanwhile


def test_an_error_while_reading_reaches_the_consumer() -> None:
    broken = feed()
    broken.images = ImagesInMemory(np.zeros((N, 5, 5, 3), np.uint8))
    with pytest.raises(ValueError):
        list(broken.batches(0, 2))


def test_waiting_for_data_is_measured() -> None:
    measured = feed()
    list(measured.batches(0, 3))
    assert measured.wait_s > 0
