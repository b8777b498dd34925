"""What workers have done, as counters that Ray exports from every node for Prometheus.

Ray puts ``ray_`` before a name. Where Ray does not run in a process nothing is counted: a run's own figures are in its
ledger and in MLflow.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Counter

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "lemon_slides_total": ("Slides that came to an end", ("stage", "status")),
    "lemon_cells_total": ("Cells that were committed; of pretraining, cells that its steps have seen", ("stage",)),
    "lemon_worker_seconds_total": ("Seconds in which workers had work: a slide, or training steps", ("stage",)),
    "lemon_device_seconds_total": ("Of these, seconds in which they ran a network", ("stage",)),
}
"""Name, meaning and labels. ``stage`` is curate, embed, formats or pretrain; ``status`` is that of a ledger's row."""


@dataclass
class Stopwatch:
    """Adds up the seconds of blocks."""

    seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


def count_slide(stage: str, *, status: str, n_cells: int, seconds: float, device_s: float) -> None:
    """Count a slide that came to an end, with its cells and the time that it took."""
    _add("lemon_slides_total", 1, stage=stage, status=status)
    count_cells(stage, n_cells, seconds=seconds, device_s=device_s)


def count_cells(stage: str, n_cells: int, *, seconds: float, device_s: float) -> None:
    """Count cells and the time that they took; ``device_s`` of it a network ran."""
    _add("lemon_cells_total", n_cells, stage=stage)
    _add("lemon_worker_seconds_total", seconds, stage=stage)
    _add("lemon_device_seconds_total", min(device_s, seconds), stage=stage)


def _add(name: str, value: float, **labels: str) -> None:
    ray = sys.modules.get("ray")  # importing it takes a second, in vain where nobody else did
    if value > 0 and ray is not None and ray.is_initialized():
        _counter(name).inc(value, labels)


@cache
def _counter(name: str) -> Counter:
    from ray.util.metrics import Counter

    meaning, labels = COUNTERS[name]
    return Counter(name, meaning, labels)
