"""What ``lemon sweep`` does: run the trials that are not done yet, then write the table of all.

The output is the only memory: ``trials/<name>/result.json`` says that a trial is done, so the same command after
``kill -9`` runs what is left, each trial from its newest checkpoint.
"""

from __future__ import annotations

from collections import Counter

from lemon.errors import EXIT_FAILURES, EXIT_OK
from lemon.probe.task import Task
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.store import Store, fingerprint
from lemon.runtime.tracking import Run, close_killed, start_run
from lemon.sweep import table
from lemon.sweep import trial as trials
from lemon.sweep.attempt import attempt
from lemon.sweep.config import SweepConfig
from lemon.sweep.grid import EXPERIMENT, SWEEP_MARK, Grid, GridTrial, build_grid

logger = stage_logger(__name__, "sweep")


def main(config: SweepConfig) -> int:
    """Run a sweep and log the outcome; returns the exit code. Raises ConfigError before any trial starts."""
    grid = build_grid(config)
    pending = [entry for entry in grid.entries if not is_over(entry, config)]
    if pending and config.on_ray:
        from lemon.sweep import tune

        tune.check_cluster(pending, config)
    with hold(config.output, stage="scaling_sweep") as output:
        return _run_all(grid, config, output)


def _run_all(grid: Grid, config: SweepConfig, output: Store) -> int:
    pending = [entry for entry in grid.entries if not is_over(entry, config)]
    points, seeds = len(config.sweep.points), ", ".join(map(str, config.all_seeds))
    logger.info(
        f"{config.sweep.name}: {points} points with seeds {seeds}; {len(grid.entries) - len(pending)} trials "
        f"are done, {len(pending)} to do, in {output.uri}"
    )
    parent = _open_parent(config, output)
    with parent.ending():
        if pending:
            _run_pending(pending, grid, config, output, parent)
        rows = table.write(grid.entries, output, study=config.sweep.name)
        table.log_summary(rows, output, parent)
    statuses = Counter({row.trial: row.status for row in rows}.values())
    for row in rows:
        if row.status != "done":
            logger.info(f"  {row.trial}: {row.status}: {row.error}")
    logger.info(table.summary(rows))
    counts = ", ".join(f"{statuses[status]} {status}" for status in ("done", "stopped", "failed"))
    logger.info(f"{len(grid.entries)} trials ({counts}); {table.PARQUET} and {table.CSV} in {output.uri}")
    return EXIT_FAILURES if statuses["failed"] else EXIT_OK


def is_over(entry: GridTrial, config: SweepConfig) -> bool:
    """Whether a trial is done, or was stopped by ASHA in a sweep that still wants that; a failed one is tried again."""
    if trials.read_result(entry.trial) is not None:
        return True
    why = table.read_no_result(entry)
    return why is not None and why.status == "stopped" and config.asha


def _run_pending(pending: list[GridTrial], grid: Grid, config: SweepConfig, output: Store, parent: Run) -> None:
    try:
        if config.on_ray:
            from lemon.sweep.tune import run_on_ray

            run_on_ray(pending, grid=grid, config=config, output=output, parent=parent)
        else:
            _run_here(pending, grid.tasks, parent=parent, tries=1 + config.max_failures)
    finally:
        for entry in grid.entries:
            close_killed(entry.trial.store, uri=parent.uri)


def _run_here(pending: list[GridTrial], tasks: list[Task], *, parent: Run, tries: int) -> None:
    """One trial after another, in this process."""
    for number, entry in enumerate(pending, 1):
        logger.info(f"{entry.trial.name}, {number} of {len(pending)}")
        if not attempt(entry, tasks=tasks, parent=parent, tries=tries) and (why := table.read_no_result(entry)):
            logger.info(f"{entry.trial.name} failed: {why.error}")


def _open_parent(config: SweepConfig, output: Store) -> Run:
    """The sweep's own MLflow run, which a rerun goes on with. It makes the database before trials open it at once."""
    output.write_json(SWEEP_MARK, {"study": config.sweep.name})
    settings = config.model_dump(mode="json", exclude={"plan"})
    tags = {"output": output.uri, "config_fingerprint": fingerprint(settings)}
    return start_run(EXPERIMENT, config.sweep.name, store=output, params=settings, tags=tags)
