"""One trial: select cells -> pretrain -> embed -> probe -> track. A plain function that any script can call.

A trial is a folder: what pretraining leaves (checkpoints, the encoder), ``probe/`` (embeddings, predictions, scores)
and ``result.json``, written last. A finished trial is never run again; an interrupted one goes on from its newest
checkpoint and with the tasks that have no scores yet, in the same MLflow run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import Selection, select_cells
from lemon.encoders.device import choose_device
from lemon.encoders.open import load_encoder
from lemon.pretrain import job as pretraining
from lemon.pretrain.assemble import EXPORT
from lemon.pretrain.check import with_absolute_paths
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.loop import Log
from lemon.pretrain.score import PROBE_FOLDER
from lemon.probe.config import ProbeConfig, ProbeSettings
from lemon.probe.job import data_fingerprint, flat_metrics, fold_means, probe_model
from lemon.probe.task import Task
from lemon.probe.tasks.catalogue import open_task
from lemon.runtime.config import AnyPath, Frozen
from lemon.runtime.store import Store, code_version, fingerprint
from lemon.runtime.tracking import Run, start_run
from lemon.schema import ScoreRow

RESULT = "result.json"


class Trial(Frozen):
    """What one trial does; plain values, so that it can be sent to a worker."""

    name: str
    pretrain: PretrainConfig = Field(description="its output is the trial's folder")
    tasks: list[str] = Field(description="names of benchmarks")
    data: AnyPath = Field("benchmarks_data", description="folder with a subfolder for each benchmark")
    probe: ProbeSettings = ProbeSettings()
    experiment: str = Field("experiment", description="of MLflow")
    params: dict[str, Any] = Field({}, description="further parameters of its MLflow run")
    made_from: str | None = Field(None, description="fingerprint of settings, cells and tasks; of a located trial")

    @property
    def store(self) -> Store:
        """The trial's folder."""
        return Store(self.pretrain.output)

    @property
    def fingerprint(self) -> str:
        """Names all that decides the scores, by content and not by path; of a located trial."""
        assert self.made_from is not None
        return self.made_from

    @property
    def probe_config(self) -> ProbeConfig:
        """The settings that ``lemon probe`` would get."""
        folder = self.store.uri
        return ProbeConfig(
            models=[folder],
            tasks=self.tasks,
            data=self.data,
            output=f"{folder}/{PROBE_FOLDER}",
            device=self.pretrain.device,
            **self.probe.model_dump(),
        )

    def located(self, tasks: Sequence[Task], *, select: Callable[..., Selection] | None = None) -> Trial:
        """The same with absolute paths, and named by what it is made from.

        Args:
            tasks: the trial's own, open.
            select: ``select_cells`` of its table, where it is remembered.

        Raises ConfigError as ``with_absolute_paths`` of pretraining and ``select_cells`` do.
        """
        pretrain = with_absolute_paths(self.pretrain)
        choose = select or partial(select_cells, Store(pretrain.cells))
        settings = pretraining.settings_of(pretrain, choose(**pretrain.select.model_dump()))
        data = [(task.name, data_fingerprint(task)) for task in tasks]
        made_from = fingerprint([settings, self.probe.model_dump(mode="json"), data])
        return self.model_copy(update={"pretrain": pretrain, "data": Store(self.data).uri, "made_from": made_from})


class TrialScore(Frozen):
    """A metric of the trial's encoder on a task: mean and standard deviation over folds (None: a single value)."""

    task: str
    protocol: str
    metric: str
    mean: float
    spread: float | None
    data_fingerprint: str


class Result(Frozen):
    """What a finished trial leaves in ``result.json``."""

    name: str
    fingerprint: str
    run_id: str
    n_cells: int
    n_slides: int
    n_organs: int
    cells_fingerprint: str
    model_fingerprint: str
    code_version: str
    scores: list[TrialScore]


def run(trial: Trial, *, tasks: list[Task] | None = None, parent: Run | None = None, log: Log | None = None) -> Result:
    """Pretrain an encoder and score it, or return what an earlier run found.

    Args:
        trial: what to do; ``trial.pretrain.output`` is its folder.
        tasks: the trial's tasks where they are open already.
        parent: the MLflow run of a sweep that this one belongs to.
        log: called with the metrics of pretraining too, (metrics, step), where this process trains.

    Raises:
        ConfigError, TaskError: the cells, the tasks or the folder are not as they must be.
        TrainingStoppedError: training diverged or collapsed.
    """
    tasks = _open(trial) if tasks is None else tasks
    trial = trial.located(tasks)
    if (done := read_result(trial)) is not None:
        return done
    config, selection = pretraining.check_and_begin(trial.pretrain)
    tracked = _open_run(trial, selection, parent=parent)
    with tracked.ending():
        pretraining.fit(config, tracked, log=log)
        result = _probed(trial, selection, tracked, tasks=tasks)
    trial.store.write_json(RESULT, result.model_dump(mode="json"))
    return result


def read_result(trial: Trial) -> Result | None:
    """The result of a located trial that is done with the same settings."""
    if not trial.store.exists(RESULT):
        return None
    result: Result = trial.store.read_json(RESULT, Result)
    return result if result.fingerprint == trial.fingerprint else None


def _open(trial: Trial) -> list[Task]:
    return [open_task(name, trial.data, seed=trial.probe.seed) for name in trial.tasks]


def _open_run(trial: Trial, selection: Selection, *, parent: Run | None) -> Run:
    """The MLflow run of this folder: a rerun goes on in the same one."""
    tags = {
        "cells_fingerprint": selection.fingerprint,
        "config_fingerprint": trial.fingerprint,
        "output": trial.store.uri,  # no parameter: it would be a difference between any two runs
    }
    settings = {"tasks": trial.tasks, "data": trial.data, "probing": trial.probe.model_dump(mode="json")}
    params = trial.pretrain.model_dump(mode="json", exclude={"output", "cache", "cache_gb"}) | settings | trial.params
    run = start_run(trial.experiment, trial.name, store=trial.store, params=params, tags=tags, parent=parent)
    run.log_dataset("cells", digest=selection.fingerprint, source=selection.store.uri, context="training")
    return run


def _probed(trial: Trial, selection: Selection, run: Run, *, tasks: list[Task]) -> Result:
    """Score the encoder that pretraining exported."""
    config = trial.probe_config
    encoder = load_encoder(trial.store.uri, device=choose_device(config.device))
    rows = probe_model(encoder, tasks, config=config, store=Store(config.output), run=run)
    if trial.pretrain.register_as is not None:
        encoder_folder = f"{trial.store.uri}/{EXPORT}"
        pretraining.register(trial.pretrain.register_as, encoder_folder, run, metrics=flat_metrics(rows))
    run.set_tag("model_fingerprint", encoder.fingerprint)
    slides = {part.slide_id for part in selection.parts}
    organs = {row.organ for row in rows_with_cells(selection.store) if row.slide_id in slides}
    return Result(
        name=trial.name,
        fingerprint=trial.fingerprint,
        run_id=run.run_id,
        n_cells=selection.n_cells,
        n_slides=len(slides),
        n_organs=len(organs - {None}),
        cells_fingerprint=selection.fingerprint,
        model_fingerprint=encoder.fingerprint,
        code_version=code_version(),
        scores=scores_of(rows),
    )


def scores_of(rows: list[ScoreRow]) -> list[TrialScore]:
    """Mean and spread over folds of every metric in rows of the scores table; robustness as it is."""
    scores = []
    for task in dict.fromkeys(row.task for row in rows):
        task_rows = [row for row in rows if row.task == task]
        robustness = [(row.protocol, row.metric, row.value, None) for row in task_rows if row.protocol == "robustness"]
        for protocol, metric, mean, spread in [*fold_means(task_rows), *robustness]:
            known = None if spread is None or not np.isfinite(spread) else spread
            facts = {"task": task, "data_fingerprint": task_rows[0].data_fingerprint}
            scores.append(TrialScore(protocol=protocol, metric=metric, mean=mean, spread=known, **facts))
    return scores
