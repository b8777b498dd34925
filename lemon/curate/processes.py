"""What curation does beside each other: worker processes that take arrays through shared memory, and ordered queues."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

_MIN_SHARED_BYTES = 1 << 16  # smaller arrays are pickled with the rest
_ALIGN_BYTES = 64

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Memory:
    """Memory of the parent, as its workers find it; ``serial`` is given once."""

    pid: int
    descriptor: int
    serial: int
    n_bytes: int


class WorkerProcesses(Executor):
    """Processes that work on one item each; what they get of arrays lies in memory that they share with this one.

    Through a pipe a region of 1024 px with its prediction takes this process longer than the network of a GPU. Each
    item under way has a piece of memory, used again for the next. It has no name in a file system, so that nothing is
    left after kill -9, and its pages are reserved. Where the system gives no such memory (other than Linux, a sandbox),
    or has none left, items are pickled.
    """

    def __init__(self, count: int, *, of: Callable[..., Any] | None = None) -> None:
        """Start ``count`` processes; ``of`` is what they will be asked for, so that they import it before they are."""
        # Started afresh (no fork), because threads and CUDA are about.
        context = multiprocessing.get_context("spawn")
        modules = () if of is None else (of.__module__,)
        self._processes = ProcessPoolExecutor(count, mp_context=context, initializer=_begin_process, initargs=modules)
        for _ in range(count):  # else each would start when there is work for it
            self._processes.submit(_nothing)
        self._shares, self._serials = hasattr(os, "memfd_create"), itertools.count()
        self._free: deque[_Memory] = deque()
        self._maps: dict[_Memory, mmap.mmap] = {}
        self._close = weakref.finalize(self, _close_all, self._maps)

    def submit(self, function: Callable[..., R], /, *items: Any, **named: Any) -> Future[R]:
        """The result of ``function`` in a worker; all of it picklable."""
        large: list[pickle.PickleBuffer] = []

        def is_small(buffer: pickle.PickleBuffer) -> bool:
            if buffer.raw().nbytes < _MIN_SHARED_BYTES:
                return True
            large.append(buffer)
            return False

        call = pickle.dumps((function, items, named), protocol=5, buffer_callback=is_small)
        starts = [0, *itertools.accumulate(_aligned(buffer.raw().nbytes) for buffer in large)]
        memory = self._memory_of(starts[-1]) if large else None
        if memory is None:
            return self._processes.submit(function, *items, **named)
        spans = [(start, buffer.raw().nbytes) for start, buffer in zip(starts, large, strict=False)]
        for buffer, (start, size) in zip(large, spans, strict=True):
            place = np.frombuffer(self._maps[memory], np.uint8, size, start)
            np.copyto(place, np.frombuffer(buffer.raw(), np.uint8))  # lets other threads run
        future = self._processes.submit(_call, call, memory, spans)
        future.add_done_callback(lambda _: self._free.append(memory))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes; their memory goes with this object where some are not waited for."""
        self._shares = False
        self._free.clear()
        self._processes.shutdown(wait, cancel_futures=cancel_futures)
        if wait:
            self._close()

    def _memory_of(self, n_bytes: int) -> _Memory | None:
        """A free piece of that size or more; None where there is none to be had."""
        while self._free:
            with contextlib.suppress(IndexError):  # another thread took it
                free = self._free.popleft()
                if free.n_bytes >= n_bytes:
                    return free
                self._maps.pop(free)
                os.close(free.descriptor)
        memory = self._new_memory(n_bytes) if self._shares else None
        if memory is not None and memory.serial == 0:  # a sandbox may not let one process open what another holds
            self._shares = self._processes.submit(_can_map, memory).result()
        return memory if self._shares else None

    def _new_memory(self, n_bytes: int) -> _Memory | None:
        """A piece whose pages are there, so that no write to it kills this process; None where there is none."""
        with contextlib.ExitStack() as stack:
            try:
                descriptor = os.memfd_create("lemon", os.MFD_CLOEXEC)
                stack.callback(os.close, descriptor)
                os.posix_fallocate(descriptor, 0, n_bytes)
                mapped = mmap.mmap(descriptor, n_bytes)
            except OSError:
                return None
            stack.pop_all()
        memory = _Memory(os.getpid(), descriptor, next(self._serials), n_bytes)
        self._maps[memory] = mapped
        return memory


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


def _close_all(maps: dict[_Memory, mmap.mmap]) -> None:
    for memory in maps:
        os.close(memory.descriptor)
    maps.clear()


def _call(call: bytes, memory: _Memory, spans: list[tuple[int, int]]) -> Any:
    """In a worker: what was asked for, with its arrays where the parent has put them."""
    view = _mapped(memory)
    function, items, named = pickle.loads(call, buffers=[view[start : start + size] for start, size in spans])  # noqa: S301
    return function(*items, **named)


def _can_map(memory: _Memory) -> bool:
    try:
        return len(_mapped(memory)) == memory.n_bytes
    except OSError:
        return False


@functools.lru_cache(maxsize=256)
def _mapped(memory: _Memory) -> memoryview:
    with Path(f"/proc/{memory.pid}/fd/{memory.descriptor}").open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), memory.n_bytes))


def _begin_process(*modules: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)
    for module in modules:
        importlib.import_module(module)


def _nothing() -> None:
    """Starts a process."""


def _end_with_parent() -> None:
    """After kill -9 of its parent a process would wait for ever: it holds the other end of its queue's pipe itself."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_ahead(items: Iterable[T], *, ahead: int) -> Generator[T, None, None]:
    """The items, made in a thread of their own, ``ahead`` of them before they are asked for; what it raises, this does.

    When the consumer stops early, the thread ends after the item that it is at.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        made = ordered_map(thread, lambda _: next(source, end), itertools.repeat(None), ahead=ahead + 1)
        with contextlib.closing(made):
            for item in made:
                if item is end:
                    return
                yield item  # type: ignore[misc]


def ordered_map(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], *, ahead: int
) -> Generator[R, None, None]:
    """``map`` on an executor with at most ``ahead`` items under way, results in the order of the items.

    When the consumer stops early, what has not begun is cancelled.
    """
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
