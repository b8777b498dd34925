"""Work beside other work: processes that share memory, maps in order, items made ahead."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lemon.curate import processes as module
from lemon.curate.processes import WorkerProcesses, ordered_map, run_ahead


@pytest.fixture(scope="module")
def processes() -> Iterator[WorkerProcesses]:
    with WorkerProcesses(2) as started:
        yield started


def _parts(item: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, Any]:
    """Views of what was given, which lie in memory that is used again."""
    return item["large"][::2], item["column_wise"], item["rest"]


def test_each_item_comes_back_as_it_was_given_while_memory_is_used_again(processes: WorkerProcesses) -> None:
    generator = np.random.default_rng(0)
    items = [
        {
            "large": generator.integers(0, 255, (int(generator.integers(1, 400)), 1000), dtype=np.uint8),
            "column_wise": np.asfortranarray(generator.normal(size=(100, 101))),
            "rest": [
                np.arange(index),
                "word",
                None,
                np.array([index], object),
                generator.normal(size=(300, 300))[:, ::2],
            ],
        }
        for index in range(60)
    ]
    for item, (large, column_wise, rest) in zip(items, ordered_map(processes, _parts, items, ahead=6), strict=True):
        np.testing.assert_array_equal(large, item["large"][::2])
        np.testing.assert_array_equal(column_wise, item["column_wise"])
        assert column_wise.flags.f_contiguous
        np.testing.assert_array_equal(rest[0], item["rest"][0])
        assert rest[1:3] == ["word", None]
        assert rest[3] == item["rest"][3]
        np.testing.assert_array_equal(rest[4], item["rest"][4])


def test_what_goes_through_the_pipe_is_small_and_memory_is_one_piece_an_item_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with WorkerProcesses(2) as processes:
        sizes: list[int] = []
        through_pipe = processes._processes.submit

        def counted(function: Any, *items: Any) -> Any:
            sizes.append(sum(len(item) for item in items if isinstance(item, bytes)))
            return through_pipe(function, *items)

        monkeypatch.setattr(processes._processes, "submit", counted)
        region = np.ones((1024, 1024, 3), np.uint8)
        assert list(ordered_map(processes, _sum, [region] * 50, ahead=4)) == [region.size] * 50
        assert max(sizes) < 1000
        assert len(processes._maps) <= 4


def _sum(array: np.ndarray) -> int:
    return int(array.sum())


@pytest.mark.parametrize("step", ["os.memfd_create", "os.posix_fallocate", "mmap.mmap"])
def test_without_memory_to_share_items_are_pickled(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not here")

    with WorkerProcesses(1) as processes:
        held = _n_descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(f"{module.__name__}.{step}", refuse)
            assert processes.submit(_sum, np.ones(1_000_000, np.uint8)).result() == 1_000_000
        assert not processes._maps
        assert _n_descriptors() == held


def _cannot_map(*_: object) -> bool:
    return False


def test_where_a_process_may_not_open_what_another_holds_items_are_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_map", _cannot_map)
    with WorkerProcesses(1) as processes:
        for _ in range(2):
            assert processes.submit(_sum, np.ones(1_000_000, np.uint8)).result() == 1_000_000


def test_memory_that_is_too_small_is_given_back(processes: WorkerProcesses) -> None:
    held = _n_held()
    for n_bytes in range(1_000_000, 9_000_000, 1_000_000):
        assert processes.submit(_sum, np.ones(n_bytes, np.uint8)).result() == n_bytes
    assert _n_held() <= held + 2


def _sum_later(array: np.ndarray) -> int:
    time.sleep(0.3)
    return _sum(array)


def test_what_is_pending_when_processes_are_ended_keeps_its_memory_and_nothing_more_is_taken() -> None:
    processes = WorkerProcesses(1)
    pending = [processes.submit(_sum_later, np.full(1_000_000, number, np.uint8)) for number in range(4)]
    processes.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        processes.submit(_sum, np.ones(1_000_000, np.uint8))
    assert [future.result() for future in pending] == [number * 1_000_000 for number in range(4)]
    processes.shutdown()  # gives its memory back, which the next test counts


def _die(array: np.ndarray) -> None:
    os._exit(1)


def test_a_process_that_dies_is_told_and_no_memory_stays() -> None:
    gc.collect()  # memory of earlier tests
    processes, held = WorkerProcesses(1), _n_held()
    assert processes.submit(_sum, np.ones(1_000_000, np.uint8)).result() == 1_000_000
    assert _n_held() == held + 1
    with pytest.raises(BrokenProcessPool):
        processes.submit(_die, np.ones(1_000_000, np.uint8)).result()
    del processes
    gc.collect()
    assert _n_held() == held


def _n_held() -> int:
    """Pieces of memory that this process holds."""
    return len(re.findall("memfd:lemon", Path("/proc/self/maps").read_text()))


def _n_descriptors() -> int:
    """Of such memory, in this process."""
    return sum("memfd:lemon" in str(link.resolve()) for link in Path("/proc/self/fd").iterdir())


PARENT = """
import os, time
from lemon.curate.processes import WorkerProcesses

if __name__ == "__main__":
    processes = WorkerProcesses(1)
    print(processes.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_worker_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running()


def test_a_map_over_workers_keeps_the_order_and_never_runs_far_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for index in range(50):
            taken.append(index)
            yield index

    with ThreadPoolExecutor(4) as pool:
        for position, result in enumerate(ordered_map(pool, lambda value: value * 2, items(), ahead=5)):
            assert result == position * 2
            assert len(taken) <= position + 6


def test_items_are_made_ahead_in_another_thread_while_the_consumer_is_busy() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for index in range(20):
            made.append(threading.get_ident())
            if index == 2:
                third.set()
            yield index

    source = run_ahead(items(), ahead=2)
    assert next(source) == 0
    assert third.wait(timeout=60)  # made although nobody asked for more than the first
    assert len(made) <= 4
    assert list(source) == list(range(1, 20))
    assert set(made) != {threading.get_ident()}


def test_what_making_an_item_raises_is_raised_at_its_place_and_an_early_end_stops_the_making() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise ValueError("second")

    source = run_ahead(failing(), ahead=3)
    assert next(source) == 1
    with pytest.raises(ValueError, match="second"):
        next(source)

    taken: list[int] = []
    source = run_ahead((taken.append(index) or index for index in range(1000)), ahead=2)  # type: ignore[func-returns-value]
    next(source)
    source.close()  # type: ignore[attr-defined]
    assert len(taken) <= 5
