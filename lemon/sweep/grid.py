"""From a sweep's settings to its trials. Everything that can be wrong is reported before the first one starts."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lemon.cells.select import Selection, select_cells
from lemon.encoders.device import choose_device
from lemon.errors import ConfigError
from lemon.pretrain import job as pretraining
from lemon.pretrain.assemble import fit_stain
from lemon.pretrain.check import with_absolute_paths
from lemon.pretrain.config import FitStainConfig, PretrainConfig
from lemon.pretrain.exclude import find_excluded
from lemon.probe.task import Task, TaskError
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.cluster import ray_address
from lemon.runtime.console import stage_logger
from lemon.runtime.demand import plan_allocation
from lemon.runtime.identifiers import file_stem
from lemon.runtime.store import Store, open_output, path_exists
from lemon.schema import SWEEP_FILE
from lemon.sweep.config import Point, SweepConfig
from lemon.sweep.points import PointFaults, cached_select, nested_organs, point_config, selection_faults
from lemon.sweep.trial import Trial
from lemon.views.stain import statistics_name

logger = stage_logger(__name__, "sweep")

EXPERIMENT = "scaling_sweep"
SWEEP_MARK = "sweep.json"
TRIALS = "trials"


@dataclass(frozen=True)
class GridTrial:
    """One point with one seed."""

    point: Point
    seed: int
    trial: Trial


@dataclass(frozen=True)
class Grid:
    """The trials, seed by seed, and the tasks that all of them are scored on."""

    entries: list[GridTrial]
    tasks: list[Task]


def build_grid(config: SweepConfig) -> Grid:
    """The trials of a sweep, with stain statistics fitted where they are missing.

    Raises ConfigError with a line for every fault of every point.
    """
    cells, output = Store(config.cells), open_sweep_output(config)
    config = config.model_copy(update={"cells": cells.uri})
    organs, select = nested_organs(cells), cached_select(cells)
    excluded = find_excluded(config.exclude_benchmarks, tasks=config.tasks, data=config.data, cells=cells)
    configs: list[tuple[Point, PretrainConfig]] = []
    faults = PointFaults([point.name for point in config.sweep.points])
    for point in config.sweep.points:
        try:
            pretrain = excluded.of(point_config(config, point, organs=organs))
        except ConfigError as error:
            faults.add(point, *str(error).splitlines())
            continue
        faults.add(point, *selection_faults(pretrain, select), *settings_faults(pretrain, config))
        configs.append((point, pretrain))
    entries = [
        GridTrial(point, seed, trial_of(config, point, pretrain, seed=seed, output=output))
        for seed in config.all_seeds
        for point, pretrain in configs
    ]
    for entry in entries:
        faults.add(entry.point, *begun_faults(entry.trial, select))
    lines = faults.lines()
    tasks, untold = _open_tasks(config) if not lines else ([], [])  # reading them may take a while
    if lines or untold:
        raise ConfigError("\n".join(lines + untold))
    if excluded.line:
        logger.info(excluded.line)
    for _, pretrain in configs:
        _fit_stain(pretrain, cells)
    return Grid([replace(entry, trial=entry.trial.located(tasks, select=select)) for entry in entries], tasks)


def open_sweep_output(config: SweepConfig) -> Store:
    """The output, which can be written and holds no other sweep. Raises ConfigError."""
    output = open_output(config.output, names=(SWEEP_MARK, SWEEP_FILE))
    if not output.exists(SWEEP_MARK) or not any(
        pretraining.is_begun(Store(f"{output.uri}/{name}")) for name in output.entries(TRIALS)
    ):
        return output
    if (study := output.read_json(SWEEP_MARK, dict[str, str]).get("study")) != config.sweep.name:
        raise ConfigError(f"output: {output.uri} holds the sweep {study!r}; choose another output")
    return output


def settings_faults(config: PretrainConfig, sweep: SweepConfig) -> list[str]:
    """What is wrong with a point's other settings on this machine."""
    faults = []
    labels = None if config.probe is None else config.probe.labels
    if sweep.asha and (labels is None or not config.workers.in_process):
        faults.append("probe: asha=true needs labelled cells (probe.labels) and one worker a trial")
    if labels is not None and not path_exists(labels):
        faults.append(f"probe.labels: {labels} not found; expected a CSV or Parquet file")
    if config.views.stain.statistics is not None:
        faults += _fault_lines(with_absolute_paths, config)
    if not sweep.on_ray:
        faults += _fault_lines(choose_device, config.device)
    elif ray_address() is None:
        here = {"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}
        faults += _fault_lines(
            functools.partial(plan_allocation, nodes=[here], addable=(), place="this machine"),
            pretraining.demand_of(config),
        )
    return faults


def trial_of(config: SweepConfig, point: Point, pretrain: PretrainConfig, *, seed: int, output: Store) -> Trial:
    """A point's trial with one seed: of training; selections and folds do not depend on it."""
    name = f"{config.sweep.name}-{point.name}-s{seed}"
    folder = f"{output.uri}/{TRIALS}/{file_stem(name)}"
    return Trial(
        name=name,
        pretrain=pretrain.model_copy(update={"output": folder, "seed": seed}),
        tasks=config.tasks,
        data=config.data,
        probe=config.probe,
        experiment=EXPERIMENT,
        params={"sweep": {"study": config.sweep.name, "point": point.name, "value": point.value}},
    )


def begun_faults(trial: Trial, select: Callable[..., Selection]) -> list[str]:
    """A trial in whose folder something was made with other settings."""
    if not pretraining.is_begun(trial.store):
        return []
    try:
        config = with_absolute_paths(trial.pretrain)
        changed = pretraining.settings_changed(config, select(**config.select.model_dump()), trial.store)
    except ConfigError:
        return []  # stain statistics that are to be fitted
    place = trial.store.uri.rpartition("/")[0]
    return [f"{changed}: trials in {place} were begun with other settings; choose another output"] if changed else []


def _fault_lines(check: Callable[..., Any], argument: Any) -> list[str]:
    try:
        check(argument)
    except ConfigError as error:
        return [str(error)]
    return []


def _open_tasks(config: SweepConfig) -> tuple[list[Task], list[str]]:
    tasks, faults = [], []
    for name in config.tasks:
        try:
            tasks.append(open_task(name, config.data, seed=config.probe.seed, **config.probe.task_options(name)))
        except TaskError as error:
            faults.append(f"tasks: {error}".replace("tasks: tasks: ", "tasks: "))
    return tasks, faults


def _fit_stain(config: PretrainConfig, cells: Store) -> None:
    """The statistics that a point's views draw from, beside the cells, where they are not there, or of other cells."""
    stain = config.views.stain
    if stain.kind != "gmm" or stain.statistics is not None:
        return
    name = statistics_name(stain.space, stain.components)
    if not cells.exists(name) or cells.read_json(name).get("cells") != select_cells(cells).fingerprint:
        path, count = fit_stain(FitStainConfig(cells=cells.uri, space=stain.space, components=stain.components))
        logger.info(f"stain statistics of {count:,} cells in {path}")
