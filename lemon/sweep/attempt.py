"""A trial of a sweep, tried as often as it may be; what became of it is in its folder."""

from __future__ import annotations

import logging

from lemon.pretrain.loop import Log
from lemon.probe.task import Task
from lemon.runtime.tracking import Run
from lemon.sweep import table
from lemon.sweep import trial as trials
from lemon.sweep.grid import GridTrial

logger = logging.getLogger(__name__)


def attempt(entry: GridTrial, *, tasks: list[Task] | None, parent: Run, tries: int, log: Log | None = None) -> bool:
    """Run a trial, ``tries`` times if need be; returns whether it is done. Its folder holds why it is not."""
    store = entry.trial.store
    for _ in range(tries):
        store.delete(table.NO_RESULT)
        try:
            trials.run(entry.trial, tasks=tasks, parent=parent, log=log)
        except Exception as error:  # the other trials go on
            logger.debug("trial %s", entry.trial.name, exc_info=True)
            table.write_no_result(entry, status="failed", error=f"{type(error).__name__}: {error}")
        else:
            return True
    return False
