"""Items worked on in this process or by a pool of Ray actors, each committed by whoever finishes it.

What an item is, how it is worked on and what is committed is its stage's: the ``Worker``. Here is what all stages have
in common: a worker that dies is replaced and its item begun again, an item that keeps killing workers is given up, what
a strange one provokes becomes its row, and an error that every other item would meet stops the job. Between processes
items and rows are pickled: in a column of numbers a missing value would become NaN.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pickle
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from lemon.errors import ConfigError, FatalError
from lemon.runtime.cluster import quiet_ray_data
from lemon.runtime.console import install_in_worker
from lemon.runtime.demand import Allocation
from lemon.runtime.ledger import Ledger
from lemon.runtime.metrics import count_slide

logger = logging.getLogger(__name__)


class SlideItem(Protocol):
    """An item; its attempts are counted by its slide's id."""

    @property
    def slide_id(self) -> str:
        """Of the slide that it is, or is of."""


class Outcome(Protocol):
    """A row of a ledger that says what became of an item."""

    @property
    def status(self) -> str:
        """done, partial or failed."""

    @property
    def n_cells(self) -> int:
        """Committed of it."""


ItemT = TypeVar("ItemT", bound=SlideItem)
RowT = TypeVar("RowT", bound=Outcome)


class CrashError(Exception):
    """A process of the worker's own died; the worker has another one and the item may be begun again."""


class AbsentError(Exception):
    """An item is not there now: nothing is committed, so that a rerun tries it again."""


class Worker(ABC, Generic[ItemT, RowT]):
    """Works on one item at a time and commits what became of it; lives in this process or in an actor.

    Attributes:
        stage: what its work is called in metrics.
        ledger: where it commits.
        fatal: errors of ``work`` that say that it cannot commit there.
        progress: for ``work`` to call with how much of an item is done, where it takes long.
        device_s: seconds in which it has run a network so far; ``work`` adds to it.
    """

    stage: str = "work"
    ledger: Ledger[Any]
    fatal: tuple[type[Exception], ...] = ()
    progress: Callable[[int], object] = staticmethod(lambda _: None)
    device_s: float = 0.0

    def ready(self, item: ItemT) -> contextlib.AbstractContextManager[ItemT]:
        """The item with all that ``work`` needs, for the length of a block; may take long while another is worked on.

        Raises AbsentError.
        """
        return contextlib.nullcontext(item)

    @property
    def output(self) -> str:
        """Where it commits, in words."""
        return self.ledger.store.uri

    def begin(self, item: ItemT, *, run_id: str) -> int:
        """Note that work begins; returns how often it began before in this run without coming to an end."""
        return self.ledger.begin(item.slide_id, run_id=run_id)

    @abstractmethod
    def work(self, item: ItemT) -> RowT:
        """The item's row, committed. Raises CrashError, FatalError and ``fatal``; all else becomes the item's row."""

    @abstractmethod
    def fail(self, item: ItemT, reason: str) -> RowT:
        """The row of an item that is given up, committed."""


@dataclass(frozen=True)
class ActorPool:
    """A pool of actors.

    Attributes:
        allocation: what an actor takes of the cluster, and how many there is room for.
        max_actors: actors at most; None: as many as there is room for.
        ahead: items that an actor gets ready while it works on another.
    """

    allocation: Allocation
    max_actors: int | None = None
    ahead: int = 0


def run_all(
    items: Sequence[ItemT],
    make: Callable[[], Worker[ItemT, RowT]],
    *,
    actors: ActorPool | None,
    max_attempts: int,
    name: str,
    unit: str = "slide",
    size: Callable[[ItemT | RowT], int] = lambda _: 1,
) -> None:
    """``run`` all items, with a bar of that name where there is a terminal; ``size`` is of an item, or its row."""
    total, disable, done, tally = sum(map(size, items)), None if items else True, 0, Counter(cells=0, failed=0)
    with tqdm(total=total, unit=unit, unit_scale=unit != "slide", desc=name, disable=disable) as bar:
        for row in run(items, make, actors=actors, max_attempts=max_attempts, progress=bar.update):
            done += 1 if row is None else size(row)
            tally.update(cells=row.n_cells if row else 0, failed=row is None or row.status == "failed")
            bar.set_postfix(tally, refresh=False)
            bar.update(done - bar.n)  # what the worker has not reported yet


def run(
    items: Sequence[ItemT],
    make: Callable[[], Worker[ItemT, RowT]],
    *,
    actors: ActorPool | None,
    max_attempts: int,
    progress: Callable[[int], object] | None = None,
) -> Iterator[RowT | None]:
    """Rows of the items as they are finished, None for one that is absent.

    In this process without ``actors``, and ``progress`` is its worker's.

    With ``actors`` Ray has been joined, and ``make`` has to be picklable. Raises FatalError, and without actors what
    ``make`` raises.
    """
    if not items:  # no Ray is started for nothing, and Ray Data takes no empty list
        return
    if actors is not None:
        yield from _on_ray(items, make, actors=actors, max_attempts=max_attempts)
        return
    worker, run_id, turn = make(), _new_run_id(), threading.Lock()
    if progress is not None:
        worker.progress = progress
    for item in items:
        yield _work_on_item(item, worker, run_id=run_id, max_attempts=max_attempts, turn=turn)


def _new_run_id() -> str:
    return uuid.uuid4().hex[:12]


def _work_on_item(
    item: ItemT, worker: Worker[ItemT, RowT], *, run_id: str, max_attempts: int, turn: threading.Lock
) -> RowT | None:
    """An item's row, whatever happens; None for one that is absent. Raises FatalError."""
    try:
        with worker.ready(item) as prepared, turn:
            start, device_s = time.perf_counter(), worker.device_s
            row = _attempt(prepared, worker, run_id=run_id, max_attempts=max_attempts)
            seconds, device_s = time.perf_counter() - start, worker.device_s - device_s
            count_slide(worker.stage, status=row.status, n_cells=row.n_cells, seconds=seconds, device_s=device_s)
            return row
    except AbsentError:
        return None
    except OSError as error:  # of the ledger: what ``work`` raises does not come here
        raise FatalError(f"cannot write to {worker.output}: {error}") from error


def _attempt(item: ItemT, worker: Worker[ItemT, RowT], *, run_id: str, max_attempts: int) -> RowT:
    while (crashes := worker.begin(item, run_id=run_id)) < max_attempts:
        try:
            return worker.work(item)
        except CrashError:
            continue
        except FatalError:
            raise
        except worker.fatal as error:
            raise FatalError(f"cannot write to {worker.output}: {error}") from error
        except ConfigError as error:  # says by itself what is wrong
            return worker.fail(item, str(error))
        except Exception as error:  # whatever a strange item provokes becomes its row, and the job goes on
            logger.exception("%s", item)
            return worker.fail(item, f"unexpected {type(error).__name__}: {error}")
    return worker.fail(item, f"given up after {crashes} crashes of its worker")


class ItemActor(Generic[ItemT, RowT]):
    """A worker in a process of Ray's. Called from several threads, it works in one while others get items ready."""

    def __init__(self, make: Callable[[], Worker[ItemT, RowT]], run_id: str, max_attempts: int) -> None:
        self.run_id, self.max_attempts, self.turn = run_id, max_attempts, threading.Lock()
        self.worker: Worker[ItemT, RowT] | None = None
        try:
            self.worker = make()
        except ConfigError as error:
            self.fault = str(error)
        except Exception as error:  # Ray would start the actor again without end  # noqa: BLE001
            self.fault = f"a worker cannot start: {type(error).__name__}: {' '.join(str(error).split())}"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One item in, its row or what stops the job out. Nothing is raised: Ray would drop or repeat the row."""
        try:
            if self.worker is None:
                raise FatalError(self.fault)
            item: ItemT = pickle.loads(batch["item"][0])  # of this job's own  # noqa: S301
            row = _work_on_item(item, self.worker, run_id=self.run_id, max_attempts=self.max_attempts, turn=self.turn)
            result: dict[str, Any] = {"row": row}
        except FatalError as error:
            result = {"fatal": str(error)}
        return {"result": np.array([pickle.dumps(result)], object)}


def _in_worker(make: Callable[[], Worker[ItemT, RowT]]) -> Worker[ItemT, RowT]:
    install_in_worker()
    return make()


def _on_ray(
    items: Sequence[ItemT], make: Callable[[], Worker[ItemT, RowT]], *, actors: ActorPool, max_attempts: int
) -> Iterator[RowT | None]:
    import ray.data

    quiet_ray_data()
    allocation = actors.allocation
    threads: Any = {"max_concurrency": 1 + actors.ahead} if actors.ahead else {}
    rows = ray.data.from_items(
        [{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items)
    ).map_batches(
        ItemActor,
        fn_constructor_args=(functools.partial(_in_worker, make), _new_run_id(), max_attempts),
        batch_size=1,
        num_cpus=allocation.cpus,
        num_gpus=allocation.gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=min(actors.max_actors or allocation.max_workers, len(items)),
            enable_true_multi_threading=actors.ahead > 0,
        ),
        **threads,
    )
    for batch_row in rows.iter_rows():
        result = pickle.loads(batch_row["result"])  # noqa: S301
        if "fatal" in result:
            raise FatalError(result["fatal"])
        yield result["row"]
