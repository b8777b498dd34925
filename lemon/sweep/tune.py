"""Trials on Ray Tune: several at a time, on one machine or a cluster. The only file of sweeps that imports ray."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from typing_extensions import TypedDict

from lemon.pretrain import job as pretraining
from lemon.pretrain.online_probe import LABELLED_METRIC
from lemon.runtime.cluster import autoscaler_nodes, nodes, start_ray
from lemon.runtime.console import install_in_worker, stage_logger
from lemon.runtime.demand import allocate, gpus_of_worker, n_workers_that_fit
from lemon.runtime.identifiers import file_stem
from lemon.runtime.records import INTERNAL_FOLDER
from lemon.runtime.store import Store, fingerprint
from lemon.runtime.tracking import Run
from lemon.sweep import table
from lemon.sweep import trial as trials
from lemon.sweep.attempt import attempt
from lemon.sweep.config import SweepConfig
from lemon.sweep.grid import Grid, GridTrial
from lemon.sweep.trial import Trial

logger = stage_logger(__name__, "sweep")

TUNE_FOLDER = f"{INTERNAL_FOLDER}/ray"
"""Of Tune's own files."""

CURRENT = f"{TUNE_FOLDER}/current.json"
"""Which experiment of Tune is going on, for ASHA; absent when none is."""

MAX_TRIAL_FAILURES = 3
"""Times that a trial is begun again whose process was lost, as with its node: no fault of the trial's."""

STEP = "step"  # as reported to Tune: its own training_iteration begins anew after an interruption
_PLACE: dict[str, float] = {"memory": 1 << 20}  # of a trial whose workers Ray Train places; nothing at all is refused


class _Current(TypedDict):
    """What CURRENT holds."""

    name: str
    trials: list[str]
    settings: str


def check_cluster(entries: Sequence[GridTrial], config: SweepConfig) -> None:
    """Join or start Ray for trials. Raises ConfigError, also where the cluster never has room for one."""
    _start_ray()
    demands = {
        (pretraining.demand_of(trial.pretrain, key="pretrain.workers"), trial.pretrain.workers.in_process)
        for trial in (entry.trial for entry in entries)
    }
    for demand, in_process in demands:
        if in_process:
            demand = replace(
                demand, wanted_workers=min(config.max_concurrent or 1, len(entries)), count_key="max_concurrent"
            )
        allocate(demand, stage="sweep")


def run_on_ray(pending: list[GridTrial], *, grid: Grid, config: SweepConfig, output: Store, parent: Run) -> None:
    """Run trials, going on with an interrupted experiment of Tune; what became of each is in its folder."""
    _start_ray()
    for entry in pending:
        entry.trial.store.delete(table.NO_RESULT)
    trainable = _trainable(grid.entries, config, parent=parent)
    if config.asha:
        _resume_tuner(pending, grid, config, output, trainable)
    why = "Ray Tune ended without it"
    if left := list(filter(_is_open, pending)):  # all, unless an interrupted experiment had them
        try:
            _new_tuner(left, grid, config, output, trainable).fit()
        except Exception as error:  # as where a file of Tune's own was cut short by a full disk
            logger.debug("Ray Tune", exc_info=True)
            why = f"Ray Tune ended: {type(error).__name__}: {error}"
    for entry in filter(_is_open, pending):
        table.write_no_result(entry, status="failed", error=f"{why}; the same command runs it again")
    output.delete(CURRENT)


def _new_tuner(pending: list[GridTrial], grid: Grid, config: SweepConfig, output: Store, trainable: Any) -> tune.Tuner:
    """A new experiment of Tune with the trials that are to do."""
    name, names = f"sweep-{int(time.time())}", [entry.trial.name for entry in pending]
    output.write_internal(
        CURRENT, json.dumps({"name": name, "trials": names, "settings": _settings(grid, config)}).encode()
    )
    return tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(names)},
        tune_config=tune.TuneConfig(
            scheduler=_asha(pending, config) if config.asha else None,
            max_concurrent_trials=config.max_concurrent or _capacity(pending),
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=output.path(TUNE_FOLDER),
            storage_filesystem=None if output.is_local else output.filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_TRIAL_FAILURES),
            callbacks=[_TrialCallback(pending)],
            verbose=0,
        ),
    )


def _resume_tuner(pending: list[GridTrial], grid: Grid, config: SweepConfig, output: Store, trainable: Any) -> None:
    """Go on with the interrupted experiment of these trials, if there is one: it knows how far ASHA was."""
    if not output.exists(CURRENT):
        return
    current: _Current = output.read_json(CURRENT, _Current)
    path, where = output.path(f"{TUNE_FOLDER}/{current['name']}"), None if output.is_local else output.filesystem
    known = {entry.trial.name for entry in pending} <= set(current["trials"])
    same = known and current["settings"] == _settings(grid, config)
    states = [name for name in output.entries(f"{TUNE_FOLDER}/{current['name']}") if "/experiment_state-" in name]
    if not same or not states or not tune.Tuner.can_restore(path, storage_filesystem=where):
        return
    try:
        tune.Tuner.restore(path, trainable, storage_filesystem=where, resume_errored=True).fit()
    except Exception as error:  # whatever Tune makes of a file of its own that was cut short  # noqa: BLE001
        logger.info(f"Ray Tune cannot go on with {path} ({type(error).__name__}); ASHA begins anew, trials go on")


def _settings(grid: Grid, config: SweepConfig) -> str:
    """Names the trials and how they are run."""
    trials = [entry.trial.fingerprint for entry in grid.entries]
    return fingerprint([trials, config.asha, config.asha_settings.model_dump(), config.max_concurrent])


def _trainable(entries: list[GridTrial], config: SweepConfig, *, parent: Run) -> Any:
    """The function that Tune calls, with what each trial takes of the cluster."""
    by_name = {entry.trial.name: entry for entry in entries}
    with_entries = tune.with_parameters(_trial, entries=by_name, parent=parent, tries=1 + config.max_failures)
    return tune.with_resources(with_entries, lambda settings: _resources(by_name[settings["trial"]].trial))


def _trial(settings: dict[str, Any], *, entries: dict[str, GridTrial], parent: Run, tries: int) -> None:
    """What Tune calls in a process of its own; to Tune a trial fails only with that process."""
    install_in_worker()
    entry = entries[settings["trial"]]
    if trials.read_result(entry.trial) is None:  # else done before an interruption; Tune had not noted it
        cpus = entry.trial.pretrain.workers.cpus
        os.environ["LOKY_MAX_CPU_COUNT"] = str(cpus)  # of the probes; else all of the machine
        attempt(entry, tasks=None, parent=parent, tries=tries, log=_report)
    if (result := trials.read_result(entry.trial)) is not None:
        tune.report(result.metrics)


def _report(metrics: Mapping[str, float], step: int) -> None:
    """Tell Tune the scores of a checkpoint; without those of labelled cells ASHA passes over them."""
    if scores := {name: value for name, value in metrics.items() if name.startswith("online/")}:
        tune.report({**scores, STEP: step})


def _resources(trial: Trial) -> Any:
    workers = trial.pretrain.workers
    if not workers.in_process:
        return tune.PlacementGroupFactory([_PLACE])
    gpus = _gpus_of(trial)
    return tune.PlacementGroupFactory([{"CPU": workers.cpus, **({"GPU": gpus} if gpus else {})}])


def _gpus_of(trial: Trial) -> float:
    return gpus_of_worker(pretraining.demand_of(trial.pretrain), nodes=[*nodes(), *(autoscaler_nodes() or ())])


def _capacity(pending: list[GridTrial]) -> int:
    """Trials that the cluster has room for at once: Tune does not count what Ray Train's workers take."""
    demands = {(pretraining.demand_of(entry.trial.pretrain), _gpus_of(entry.trial)) for entry in pending}
    holds = (n_workers_that_fit(nodes(), cpus=each.cpus, gpus=gpus) // each.wanted_workers for each, gpus in demands)
    return max(1, min(holds))


def _asha(pending: list[GridTrial], config: SweepConfig) -> Any:
    steps = max(entry.trial.pretrain.total_steps for entry in pending)
    grace = max(1, round(config.asha_settings.grace_share * steps))
    return ASHAScheduler(
        time_attr=STEP,
        metric=LABELLED_METRIC,
        mode="max",
        max_t=steps + 1,  # the last report must not end a trial: its probes are to come
        grace_period=grace,
        reduction_factor=config.asha_settings.reduction,
    )


def _name_of(trial: Any) -> str:
    return file_stem(trial.config["trial"])


class _TrialCallback(tune.Callback):
    """A line for every trial that comes to an end, and a note in the folder of one that ASHA ended."""

    def __init__(self, entries: list[GridTrial]) -> None:
        self._entries = {file_stem(entry.trial.name): entry for entry in entries}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial is done, or was ended by ASHA."""
        self._end(self._entries[str(trial)], status="stopped", error="by ASHA: its online probe fell behind")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """The process of a trial was lost, or could not write why the trial failed."""
        logger.info(f"{self._entries[str(trial)].trial.name}: begun again: {_reason(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """A trial failed; one whose process died could not note why."""
        self._end(self._entries[str(trial)], status="failed", error=_reason(trial))

    def _end(self, entry: GridTrial, *, status: str, error: str) -> None:
        with contextlib.suppress(OSError):  # in here it would end Tune with a traceback; it is reported after Tune
            if _is_open(entry):
                table.write_no_result(entry, status=status, error=error)
            left = sum(map(_is_open, self._entries.values()))
            logger.info(f"{entry.trial.name} ended, {left} of {len(self._entries)} to come")


def _reason(trial: Any) -> str:
    """Why the process of a trial ended: of this machine's copy of Tune's note the last line, its first sentence."""
    note = Path(trial.error_file or "")
    lines = note.read_text(errors="replace").strip().splitlines() if note.is_file() else []
    return lines[-1].partition(". ")[0] if lines else "its process died"


def _is_open(entry: GridTrial) -> bool:
    return trials.read_result(entry.trial) is None and table.read_no_result(entry) is None


def _start_ray() -> None:
    """As ``lemon.runtime.cluster.start_ray``, with the dashboard on: without it an ASHA sweep never ended.

    (Ray 2.60.)
    """
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune draws boxes, also with verbose=0
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # a traceback; ``_TrialCallback`` logs a line
    logging.getLogger("ray.tune.execution.experiment_state").setLevel(logging.CRITICAL)  # the same
    # The last report of a trial has its scores, and nothing for ASHA, which else might stop what is done.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else Tune returns after Ctrl-C as if all were done
    start_ray(dashboard=True)
