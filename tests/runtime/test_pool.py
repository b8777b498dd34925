"""Items in this process and in an actor's hands: what becomes a row, what is begun again, what stops the job."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from lemon.errors import ConfigError
from lemon.runtime import pool


@dataclasses.dataclass(frozen=True)
class Item:
    slide_id: str
    do: str
    n_cells: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    id: str
    error: str | None
    n_cells: int = 1

    @property
    def status(self) -> str:
        return "failed" if self.error else "done"


class Doer(pool.Worker[Item, Row]):
    """Does what its items say; keeps what it committed."""

    fatal = (OSError,)
    output = "there"

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.committed: list[Row] = []

    @contextlib.contextmanager
    def ready(self, item: Item) -> Iterator[Item]:
        if item.do == "absent":
            raise pool.AbsentError("not\nthere")
        yield item

    def begin(self, item: Item, *, run_id: str) -> int:
        if item.do == "no ledger":
            raise OSError("Read-only file system")
        self.begun[item.slide_id] += 1
        return self.begun[item.slide_id] - 1

    def work(self, item: Item) -> Row:
        if item.do == "crash" or (item.do == "crash once" and self.begun[item.slide_id] == 1):
            raise pool.CrashError
        if item.do == "full":
            raise OSError("No space left on device")
        if item.do == "fatal":
            raise pool.FatalError("nothing works any more")
        if item.do == "config":
            raise ConfigError("key: got x")
        if item.do == "strange":
            raise ZeroDivisionError("a strange item")
        return self._commit(item, None)

    def fail(self, item: Item, reason: str) -> Row:
        return self._commit(item, reason)

    def _commit(self, item: Item, reason: str | None) -> Row:
        row = Row(item.slide_id, reason, 0 if reason else item.n_cells)
        self.committed.append(row)
        return row


def here(worker: Doer, *items: str) -> list[Row | None]:
    listed = [Item(str(number), do) for number, do in enumerate(items)]
    return list(pool.run(listed, lambda: worker, actors=None, max_attempts=2))


def in_actor(worker: Doer, *items: str) -> list[Row | None]:
    """As Ray calls it."""
    actor = pool.ItemActor(lambda: worker, "run", 2)
    rows = []
    for number, do in enumerate(items):
        batch = {"item": np.array([pickle.dumps(Item(str(number), do))], object)}
        told: dict[str, Any] = pickle.loads(actor(batch)["result"][0])  # noqa: S301
        if "fatal" in told:
            raise pool.FatalError(told["fatal"])
        rows.append(told["row"])
    return rows


both = pytest.mark.parametrize("run", [here, in_actor])


@both
@pytest.mark.parametrize(
    ("do", "error"),
    [
        ("work", None),
        ("crash once", None),
        ("crash", "given up after 2 crashes of its worker"),
        ("strange", "unexpected ZeroDivisionError: a strange item"),
        ("config", "key: got x"),
    ],
)
def test_what_an_item_provokes_is_its_own_row_and_the_others_are_done(run: Any, do: str, error: str | None) -> None:
    worker = Doer()
    rows = run(worker, "work", do, "work")
    assert [row.error for row in rows] == [None, error, None]
    assert worker.committed == rows


@both
def test_an_item_that_is_absent_has_no_row(run: Any) -> None:
    worker = Doer()
    rows = run(worker, "absent", "work")
    assert rows == [None, Row("1", None)]
    assert [row.id for row in worker.committed] == ["1"]


@both
def test_each_item_that_came_to_an_end_is_counted_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, str, int]] = []

    def note(stage: str, *, status: str, n_cells: int, seconds: float, device_s: float) -> None:
        assert 0 <= device_s <= seconds
        counted.append((stage, status, n_cells))

    monkeypatch.setattr(pool, "count_slide", note)
    run(Doer(), "work", "absent", "crash once", "strange")
    assert counted == [("work", "done", 1), ("work", "done", 1), ("work", "failed", 0)]


@both
@pytest.mark.parametrize(
    ("do", "line"),
    [
        ("full", "cannot write to there: No space left on device"),
        ("no ledger", "cannot write to there: Read-only file system"),
        ("fatal", "nothing works any more"),
    ],
)
def test_what_every_item_would_meet_stops_the_job(run: Any, do: str, line: str) -> None:
    worker = Doer()
    with pytest.raises(pool.FatalError) as caught:
        run(worker, "work", do, "work")
    assert str(caught.value) == line
    assert [row.id for row in worker.committed] == ["0"]


@pytest.mark.parametrize("error", [ConfigError("model: got x"), RuntimeError("bad\nweights")])
def test_a_worker_that_cannot_start_stops_the_job_and_is_not_started_for_ever(error: Exception) -> None:
    def make() -> Doer:
        raise error

    actor = pool.ItemActor(make, "run", 2)
    told = pickle.loads(actor({"item": np.array([pickle.dumps(None)], object)})["result"][0])  # noqa: S301
    assert " ".join(str(error).split()) in told["fatal"]


def test_no_items_start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data refuses an empty list, and Ray takes ten seconds to start."""
    assert list(pool.run([], functools.partial(pytest.fail, "made"), actors=None, max_attempts=1)) == []
    assert list(pool.run([], functools.partial(pytest.fail, "made"), actors=object(), max_attempts=1)) == []  # type: ignore[arg-type]


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar as on a terminal, kept for the test."""

    last: Bar

    def __init__(self, **options: Any) -> None:
        super().__init__(**options | {"disable": False, "file": io.StringIO()})
        Bar.last = self


def test_the_bar_counts_sizes_once_whether_the_worker_told_of_them_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Teller(Doer):
        def work(self, item: Item) -> Row:
            if item.do == "tell":
                self.progress(2)
            return super().work(item)

    monkeypatch.setattr(pool, "tqdm", Bar)
    items = [Item(str(number), do, n_cells=4) for number, do in enumerate(["tell", "well", "strange"])]
    options: dict[str, Any] = {"actors": None, "max_attempts": 1, "name": "try", "unit": "cell"}
    pool.run_all(items, Teller, size=lambda each: each.n_cells, **options)
    assert (Bar.last.n, Bar.last.total, Bar.last.desc) == (8, 12, "try")
    assert Bar.last.postfix == "cells=8, failed=1"
