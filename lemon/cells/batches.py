"""From images of cells to uint8 batches on the device, in an order fixed by the seed and resumable at a step."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from lemon.schema import CELL_PX


@dataclass(frozen=True)
class Order:
    """The order in which cells are seen: one random permutation after another, without end.

    Position ``p`` lies in pass ``p // n_cells``. An epoch is a number of images, not a pass.
    """

    n_cells: int
    seed: int

    def indices(self, start: int, count: int) -> np.ndarray:
        """Cells at positions ``start`` to ``start + count``: int64 [count]."""
        parts = []
        while count:
            turn, offset = divmod(start, self.n_cells)
            part = _permutation(self.n_cells, self.seed, turn)[offset : offset + count].astype(np.int64)
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


@functools.lru_cache(maxsize=2)
def _permutation(n_cells: int, seed: int, turn: int) -> np.ndarray:
    order = np.arange(n_cells, dtype=np.uint32 if n_cells <= 1 << 32 else np.int64)
    np.random.default_rng([seed, turn]).shuffle(order)
    return order


@dataclass
class Feed:
    """Batches of one worker. Batch ``s`` of all workers together is positions ``s * batch`` to ``(s + 1) * batch``,
    whatever the number of workers. Where that number does not divide the batch, as in an elastic run, each share is
    rounded up, and the last worker reaches into the positions of the next batch by less than a cell a worker.

    ``resident`` keeps all images on the device, where they fit; else a thread gathers ``ahead`` batches in advance.
    """

    images: np.ndarray  # [N, 60, 60, 3] uint8
    order: Order
    batch: int
    device: torch.device
    rank: int = 0
    world: int = 1
    resident: bool = False
    ahead: int = 3
    wait_s: float = field(default=0.0, init=False)
    """Seconds that the consumer waited for data so far."""

    def __post_init__(self) -> None:
        self._on_device = torch.from_numpy(np.asarray(self.images)).to(self.device) if self.resident else None

    def batches(self, first_step: int, last_step: int) -> Iterator[torch.Tensor]:
        """uint8 [ceil(batch / world), 60, 60, 3] on the device: steps ``first_step`` to ``last_step`` (exclusive)."""
        if self._on_device is not None:
            for step in range(first_step, last_step):
                indices = torch.from_numpy(self._indices(step))
                if self.device.type == "cuda":
                    indices = indices.pin_memory()  # a copy from other memory would wait for the step before
                yield self._on_device[indices.to(self.device, non_blocking=True)]
            return
        ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(self.ahead)
        stop = threading.Event()
        thread = threading.Thread(target=self._gather, args=(first_step, last_step, ready, stop), daemon=True)
        thread.start()
        try:
            for _ in range(first_step, last_step):
                start = time.perf_counter()
                batch = ready.get()
                self.wait_s += time.perf_counter() - start
                if isinstance(batch, BaseException):
                    raise batch
                yield batch.to(self.device, non_blocking=True)
        finally:
            stop.set()
            thread.join()

    def _indices(self, step: int) -> np.ndarray:
        per_worker = -(-self.batch // self.world)
        return self.order.indices(step * self.batch + self.rank * per_worker, per_worker)

    def _gather(self, first: int, last: int, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            flat = self.images.reshape(len(self.images), -1)
            for step in range(first, last):
                indices = self._indices(step)
                pinned = self.device.type == "cuda"
                batch = torch.empty((len(indices), flat.shape[1]), dtype=torch.uint8, pin_memory=pinned)
                np.take(flat, indices, axis=0, out=batch.numpy(), mode="clip")  # "clip" writes without a copy
                if not _put(ready, batch.view(-1, CELL_PX, CELL_PX, 3), stop):
                    return
        except Exception as error:  # handed to the consumer, which raises it  # noqa: BLE001
            _put(ready, error, stop)


def _put(ready: queue.Queue, item: torch.Tensor | BaseException, stop: threading.Event) -> bool:
    """Put into a full queue without hanging when the consumer has gone; False then."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
