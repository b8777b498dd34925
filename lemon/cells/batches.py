"""From the images of cells to uint8 batches on the device, in an order fixed by the seed and resumable at a step."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lemon.cells.cache import CachedImages, bytes_in_cache
from lemon.cells.images import Images
from lemon.cells.order import Order, Permutation, Stream
from lemon.cells.select import Selection
from lemon.cells.stream import StreamedImages
from lemon.schema import CELL_PX

_RESIDENT_ROWS = 8192  # copied to the device at a time


def is_streamed(selection: Selection, *, cache_gb: float) -> bool:
    """Whether a selection is larger than the cache may be."""
    return bytes_in_cache(selection) > cache_gb * 1e9


def open_images(
    selection: Selection, *, cache: str | Path, cache_gb: float, seed: int, batch: int
) -> tuple[Images, Order]:
    """The images of a selection and the order that suits them: from the cache, uniform; or streamed from the table.

    Raises ConfigError and StorageError as ``CachedImages`` does.
    """
    if is_streamed(selection, cache_gb=cache_gb):
        sizes = tuple(part.n_rows for part in selection.parts)
        return StreamedImages(selection), Stream(sizes, seed=seed, batch=batch)
    images = CachedImages(selection, cache=cache, cache_gb=cache_gb)
    return images, Permutation(selection.n_cells, seed=seed)


@dataclass
class Feed:
    """Batches of one worker. Batch ``s`` of all workers together is positions ``s * batch`` to ``(s + 1) * batch``,
    whatever the number of workers. Where that number does not divide the batch, as in an elastic run, each share is
    rounded up, and the last worker reaches into the positions of the next batch by less than a cell a worker.

    ``resident`` keeps all images on the device, where they fit. Else a thread reads ``ahead`` batches in advance, and
    says ``announced`` batches in advance which cells it will read.
    """

    images: Images
    order: Order
    batch: int
    device: torch.device
    rank: int = 0
    world: int = 1
    resident: bool = False
    ahead: int = 3
    announced: int = 8
    wait_s: float = field(default=0.0, init=False)
    """Seconds that the consumer waited for data so far."""

    def __post_init__(self) -> None:
        self._on_device = self._load() if self.resident else None

    def close(self) -> None:
        """Let go of the images' files."""
        self.images.close()

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

    def _load(self) -> torch.Tensor:
        """All images, on the device."""
        shape = (self.order.n_cells, CELL_PX, CELL_PX, 3)
        images = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for first in range(0, len(images), _RESIDENT_ROWS):
            some = images[first : first + _RESIDENT_ROWS]
            some.copy_(self._read(np.arange(first, first + len(some))))
        return images

    def _indices(self, step: int) -> np.ndarray:
        per_worker = -(-self.batch // self.world)
        return self.order.indices(step * self.batch + self.rank * per_worker, per_worker)

    def _read(self, numbers: np.ndarray) -> torch.Tensor:
        shape = (len(numbers), CELL_PX, CELL_PX, 3)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.images.read(numbers, batch.numpy())
        return batch

    def _gather(self, first: int, last: int, ready: queue.Queue, stop: threading.Event) -> None:
        try:
            coming: deque[np.ndarray] = deque()
            for step in range(first, last + self.announced):
                if step < last:
                    coming.append(self._indices(step))
                    self.images.prepare(coming[-1])
                if step >= first + self.announced and not _put(ready, self._read(coming.popleft()), stop):
                    return
        except Exception as error:  # handed to the consumer, which raises it  # noqa: BLE001
            _put(ready, error, stop)
        finally:
            self.images.forget()


def _put(ready: queue.Queue, item: torch.Tensor | BaseException, stop: threading.Event) -> bool:
    """Put into a full queue without hanging when the consumer has gone; False then."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
