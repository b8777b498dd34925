"""One trial: its scores, its MLflow run, and what a second call does."""

from __future__ import annotations

from pathlib import Path

import pytest

from lemon.errors import ConfigError
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.loop import TrainingStoppedError
from lemon.probe.config import ProbeSettings
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.tracking import metric_history, run_of, start_run
from lemon.sweep import trial as trials
from lemon.sweep.trial import Trial
from tests.sweep.studies import TINY, light_task, write_cells

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    write_cells(folder / "cells")
    return folder


@pytest.fixture(autouse=True)
def uri(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    place = f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    return place


def trial_in(home: Path, name: str, *words: str) -> Trial:
    places = [f"cells={home / 'cells'}", f"output={home / name}", f"cache={home / 'cache'}"]
    tiny = [word.removeprefix("pretrain.") for word in TINY]
    pretrain = load("pretrain", [*tiny, *places, "epochs=2", *words], PretrainConfig)
    probe = ProbeSettings(bootstrap=100, probes=["linear"])
    return Trial(name=name, pretrain=pretrain, tasks=["light"], data=str(home), probe=probe, params={"sweep": {"x": 1}})


def test_a_trial_is_pretrained_and_scored_in_one_run_that_belongs_to_its_parent(home: Path, uri: str) -> None:
    import mlflow

    parent = start_run("experiment", "parent", store=Store(home), params={})
    seen: list[int] = []
    result = trials.run(
        trial_in(home, "a", "select.n_cells=50"),
        tasks=[light_task()],
        parent=parent,
        log=lambda metrics, step: seen.append(step),
    )
    assert (result.n_cells, result.n_slides, result.n_organs) == (50, 6, 3)
    scores = {(score.protocol, score.metric): score for score in result.scores}
    assert scores["leak-free", "balanced_accuracy"].mean > 0.9
    assert scores["paper", "balanced_accuracy"].spread is not None
    assert seen[:3] == [1, 2, 2]  # with each checkpoint the indicators too
    client = mlflow.MlflowClient(uri)
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert run.data.tags["cells_fingerprint"] == result.cells_fingerprint
    assert {"loss", "epoch", "probe/light/balanced_accuracy", "probe/light/paper/auroc"} <= run.data.metrics.keys()
    assert {"sweep.x": "1", "select.n_cells": "50", "seed": "0"}.items() <= run.data.params.items()
    datasets = {given.dataset.name: given.dataset.digest for given in run.inputs.dataset_inputs}
    assert datasets == {"cells": result.cells_fingerprint, "light": result.scores[0].data_fingerprint}
    found = client.search_runs([experiment_id.experiment_id for experiment_id in client.search_experiments()])
    assert len(found) == 2  # the parent and this one: neither pretraining nor probing made one of its own
    (version,) = client.search_model_versions("name='lemon'")
    assert version.run_id == result.run_id
    assert version.tags["ssl"] == "MoCo v3"


def test_a_finished_trial_is_not_run_again_and_further_tasks_cost_no_second_pretraining(
    home: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    import mlflow

    trial = trial_in(home, "b", "register_as=other")
    first = trials.run(trial, tasks=[light_task()])
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "fit", lambda *_, **__: pytest.fail("it was run again"))
        assert trials.run(trial, tasks=[light_task()]) == first
    more = trial.model_copy(update={"probe": trial.probe.model_copy(update={"seed": 1})})
    again = trials.run(more, tasks=[light_task()])
    assert (again.run_id, again.model_fingerprint) == (first.run_id, first.model_fingerprint)
    run = run_of(more.store, uri=uri)
    assert run is not None
    assert [step for step, _ in metric_history(run, "loss")] == [1, 2, 3, 4]
    assert len(mlflow.MlflowClient(uri).search_model_versions("name='other'")) == 1


def test_a_trial_that_diverges_leaves_no_result_and_a_failed_run(home: Path, uri: str) -> None:
    import mlflow

    trial = trial_in(home, "c", "ssl.base_lr=1e30", "epochs=4", "checkpoint_every=100")
    with pytest.raises(TrainingStoppedError):
        trials.run(trial, tasks=[light_task()])
    assert trials.read_result(trial.located([light_task()])) is None
    run = run_of(trial.store, uri=uri)
    assert run is not None
    assert mlflow.MlflowClient(uri).get_run(run.run_id).info.status == "FAILED"


def test_a_folder_begun_with_other_settings_is_refused(home: Path) -> None:
    trials.run(trial_in(home, "d"), tasks=[light_task()])
    with pytest.raises(ConfigError, match=r"other settings \(seed 0 then, 3 now\)"):
        trials.run(trial_in(home, "d", "seed=3"), tasks=[light_task()])
