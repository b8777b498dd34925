"""Items worked on in this process or by a pool of Ray actors, each committed by whoever finishes it.

What an item is, how it is worked on and what is committed is its stage's: the ``Worker``. Here is what all stages have
in common: a worker that dies is replaced and its item begun again, an item that keeps killing workers is given up, what
a strange one provokes becomes its row, and an error that every other item would meet stops the job. Between processes
items and rows are pickled: in a column of numbers a missing value would become NaN.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from lemon.errors import ConfigError
from lemon.runtime.cluster import quiet_ray_data
from lemon.runtime.demand import Granted

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Row = TypeVar("Row")


class FatalError(Exception):
    """The job cannot go on: any other item would meet the same, as a disk that is full or a model that is not there."""


class CrashError(Exception):
    """A process of the worker's own died; the worker has another one and the item may be begun again."""


class AbsentError(Exception):
    """An item is not there now: nothing is committed, so that a rerun tries it again."""


class Worker(ABC, Generic[Item, Row]):
    """Works on one item at a time and commits what became of it; lives in this process or in an actor.

    Attributes:
        output: where it commits, in words.
        fatal: errors of ``work`` that say that it cannot commit there.
    """

    output: str
    fatal: tuple[type[Exception], ...] = ()

    def ready(self, item: Item) -> contextlib.AbstractContextManager[Item]:
        """The item with all that ``work`` needs, for the length of a block; may take long while another is worked on.

        Raises AbsentError.
        """
        return contextlib.nullcontext(item)

    @abstractmethod
    def begin(self, item: Item, *, run_id: str) -> int:
        """Note that work begins; returns how often it began before in this run without coming to an end."""

    @abstractmethod
    def work(self, item: Item) -> Row:
        """The item's row, committed. Raises CrashError, FatalError and ``fatal``; all else becomes the item's row."""

    @abstractmethod
    def fail(self, item: Item, reason: str) -> Row:
        """The row of an item that is given up, committed."""


@dataclass(frozen=True)
class Actors:
    """A pool of actors.

    Attributes:
        granted: what an actor takes of the cluster, and how many there is room for.
        most: actors at most; None: as many as there is room for.
        ahead: items that an actor gets ready while it works on another.
    """

    granted: Granted
    most: int | None = None
    ahead: int = 0


def run(
    items: Sequence[Item], make: Callable[[], Worker[Item, Row]], *, actors: Actors | None, max_attempts: int
) -> Iterator[Row | None]:
    """Rows of the items as they are finished, None for one that is absent; in this process without ``actors``.

    With ``actors`` Ray has been joined, and ``make`` has to be picklable. Raises FatalError, and without actors what
    ``make`` raises.
    """
    if not items:  # no Ray is started for nothing, and Ray Data takes no empty list
        return
    if actors is not None:
        yield from _on_ray(items, make, actors=actors, max_attempts=max_attempts)
        return
    worker, run_id, turn = make(), _new_run(), threading.Lock()
    for item in items:
        yield _settle(item, worker, run_id=run_id, max_attempts=max_attempts, turn=turn)


def _new_run() -> str:
    return uuid.uuid4().hex[:12]


def _settle(
    item: Item, worker: Worker[Item, Row], *, run_id: str, max_attempts: int, turn: threading.Lock
) -> Row | None:
    """An item's row, whatever happens; None for one that is absent. Raises FatalError."""
    try:
        with worker.ready(item) as prepared, turn:
            return _attempt(prepared, worker, run_id=run_id, max_attempts=max_attempts)
    except AbsentError:
        return None
    except OSError as error:  # of the ledger: what ``work`` raises does not come here
        raise FatalError(f"cannot write to {worker.output}: {error}") from error


def _attempt(item: Item, worker: Worker[Item, Row], *, run_id: str, max_attempts: int) -> Row:
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


class ItemActor(Generic[Item, Row]):
    """A worker in a process of Ray's. Called from several threads, it works in one while others get items ready."""

    def __init__(self, make: Callable[[], Worker[Item, Row]], run_id: str, max_attempts: int) -> None:
        self.run_id, self.max_attempts, self.turn = run_id, max_attempts, threading.Lock()
        self.worker: Worker[Item, Row] | None = None
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
            item: Item = pickle.loads(batch["item"][0])  # of this job's own  # noqa: S301
            row = _settle(item, self.worker, run_id=self.run_id, max_attempts=self.max_attempts, turn=self.turn)
            told: dict[str, Any] = {"row": row}
        except FatalError as error:
            told = {"fatal": str(error)}
        return {"told": np.array([pickle.dumps(told)], object)}


def _on_ray(
    items: Sequence[Item], make: Callable[[], Worker[Item, Row]], *, actors: Actors, max_attempts: int
) -> Iterator[Row | None]:
    import ray.data

    quiet_ray_data()
    granted = actors.granted
    threads: Any = {"max_concurrency": 1 + actors.ahead} if actors.ahead else {}
    rows = ray.data.from_items(
        [{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items)
    ).map_batches(
        ItemActor,
        fn_constructor_kwargs={"make": make, "run_id": _new_run(), "max_attempts": max_attempts},
        batch_size=1,
        num_cpus=granted.cpus,
        num_gpus=granted.gpus,
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=min(actors.most or granted.room, len(items)),
            enable_true_multi_threading=actors.ahead > 0,
        ),
        **threads,
    )
    for found in rows.iter_rows():
        told = pickle.loads(found["told"])  # noqa: S301
        if "fatal" in told:
            raise FatalError(told["fatal"])
        yield told["row"]
