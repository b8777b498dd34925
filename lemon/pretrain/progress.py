"""How far training is: a bar on a terminal, else lines in whatever is read instead, as a job's log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from tqdm import tqdm

from lemon.runtime.console import stage_logger
from lemon.runtime.tracking import Run, metric_history

logger = stage_logger(__name__, "pretrain")

LINE_EVERY_S = 60.0
FOLLOW_EVERY_S = 10.0
LONG_H = 24.0
"""Runs that will take longer get a warning."""


class Progress:
    """Tells steps, loss, images/s and the time that is left.

    Args:
        total: steps of the whole run.
        batch: images a step, of all workers.
        clock: seconds, of which only differences count.
    """

    def __init__(self, total: int, *, batch: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._batch, self._clock = total, batch, clock
        self._bar = tqdm(total=total, unit="step", desc="pretrain", disable=None)
        self._logged_s: float | None = None
        self._reports = 0

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        """Called with what is logged; metrics without a loss, as those of a checkpoint, are no news here."""
        if "loss" not in metrics:
            return
        self._reports += 1
        speed = metrics["images_per_s"]
        left_s = (self._total - step) * self._batch / speed
        self._bar.set_postfix(loss=f"{metrics['loss']:.3f}", images_s=f"{speed:,.0f}", refresh=False)
        self._bar.update(step - self._bar.n)
        if self._reports == 2 and left_s > LONG_H * 3600:  # the first window has the compiler and cold caches in it
            logger.info(
                f"at {speed:,.3g} images/s the {self._total - step:,} steps to come take {left_s / 3600:,.0f} hours"
            )
        now = self._clock()
        if self._bar.disable and (
            self._logged_s is None or now - self._logged_s >= LINE_EVERY_S or step == self._total
        ):
            self._logged_s = now
            share = f"{100 * step / self._total:.0f} %"
            line = f"step {step:,} of {self._total:,} ({share}), loss {metrics['loss']:.3f}, {speed:,.0f} images/s"
            logger.info(f"{line}, {duration(left_s)} left" if step < self._total else line)


@contextmanager
def following(run: Run, progress: Progress, *, every_s: float = FOLLOW_EVERY_S) -> Iterator[None]:
    """For a training in other processes: ``progress`` by what it logs to MLflow, as long as the block lasts."""
    ended = threading.Event()

    def follow() -> None:
        last_step, last_look = 0, False
        while not last_look:
            last_look = ended.wait(every_s)
            with suppress(Exception):  # MLflow is asked again; what it does not tell costs a line
                (step, loss), speed = metric_history(run, "loss")[-1], metric_history(run, "images_per_s")[-1][1]
                if step > last_step:
                    progress({"loss": loss, "images_per_s": speed}, step)
                    last_step = step

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Seconds in the units that a person would use: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
