from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lemon.cells.batches import Feed, Order
from tests.cells_table import numbered, numbers_of

CPU = torch.device("cpu")


def feed(count: int = 150, *, batch: int = 20, **options: object) -> Feed:
    return Feed(numbered(count), Order(count, seed=7), batch=batch, device=CPU, **options)  # type: ignore[arg-type]


def test_every_pass_is_a_permutation_and_the_next_one_another() -> None:
    order = Order(100, seed=1)
    first, second = order.indices(0, 100), order.indices(100, 100)
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first != second).any()
    assert (order.indices(60, 80) == np.concatenate([first[60:], second[:40]])).all()
    assert (Order(100, seed=2).indices(0, 100) != first).any()


def test_an_epoch_may_be_larger_than_the_set() -> None:
    assert len(Order(7, seed=0).indices(3, 40)) == 40


@pytest.mark.parametrize("resident", [True, False])
def test_batches_follow_the_order_and_go_on_at_any_step(resident: bool) -> None:
    whole = [numbers_of(batch) for batch in feed(resident=resident).batches(0, 9)]
    assert whole == [Order(150, seed=7).indices(20 * step, 20).tolist() for step in range(9)]
    assert [numbers_of(batch) for batch in feed(resident=resident).batches(4, 9)] == whole[4:]


@pytest.mark.parametrize("world", [2, 4, 5])
def test_the_batch_of_all_workers_together_does_not_depend_on_their_number(world: int) -> None:
    alone = [numbers_of(batch) for batch in feed().batches(0, 5)]
    shares = [[numbers_of(batch) for batch in feed(rank=rank, world=world).batches(0, 5)] for rank in range(world)]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("world", [3, 6, 7])
def test_workers_that_do_not_divide_the_batch_share_it_alike_and_leave_none_out(world: int) -> None:
    alone = [numbers_of(batch) for batch in feed().batches(0, 5)]
    shares = [[numbers_of(batch) for batch in feed(rank=rank, world=world).batches(0, 5)] for rank in range(world)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert len({len(part) for part in parts}) == 1
        together = list(itertools.chain(*parts))
        assert together[:20] == batch
        assert len(together) - 20 < world


def test_a_consumer_that_stops_early_leaves_no_thread_behind() -> None:
    import threading

    before = threading.active_count()
    stream = feed().batches(0, 1000)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_consumer() -> None:
    broken = feed()
    broken.order = Order(10_000, seed=0)
    broken.images = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        list(broken.batches(0, 2))


def test_waiting_for_data_is_measured() -> None:
    measured = feed()
    list(measured.batches(0, 3))
    assert measured.wait_s > 0
