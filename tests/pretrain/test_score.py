"""Scores of a finished encoder on the MLflow run that trained it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemon.encoders.open import Encoder
from lemon.errors import EXIT_OK, ConfigError
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.probe import job as probing
from lemon.probe.config import ProbeConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN, training_run_of
from lemon.schema import MORPHOMETRICS
from tests.cells_table import synthetic_crops, write_slide
from tests.sweep.studies import TINY

pytestmark = pytest.mark.usefixtures("console")


def config_in(folder: Path, *words: str) -> PretrainConfig:
    places = [f"cells={folder / 'cells'}", f"output={folder / 'run'}", f"cache={folder / 'cache'}"]
    tiny = [word.removeprefix("pretrain.") for word in TINY]
    return load("pretrain", [*tiny, "epochs=2", *places, *words], PretrainConfig)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six slides whose nuclei have measures, and an MLflow of their own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    generator = np.random.default_rng(0)
    for slide in range(6):
        arrays = {name: generator.random(20) for name in MORPHOMETRICS}
        write_slide(Store(tmp_path / "cells"), f"s{slide}", synthetic_crops(20, seed=slide), arrays=arrays)
    return tmp_path


def client_of(home: Path) -> Any:
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{home / 'mlflow.db'}")


def run_in(home: Path) -> Any:
    return client_of(home).get_run(Store(home / "run").read_json(RUN)["run_id"])


@pytest.mark.slow
def test_a_finished_run_has_probe_metrics_without_labels_and_its_version_carries_them(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, counted = [], []
    embed, count = Encoder.embed, probing.count
    monkeypatch.setattr(Encoder, "embed", lambda self, images: encoded.append(len(images)) or embed(self, images))
    monkeypatch.setattr(probing, "count", lambda *model, **facts: counted.append(model) or count(*model, **facts))
    assert pretraining.main(config_in(home)) == EXIT_OK
    assert (sum(encoded), len(counted)) == (240, 1), "120 cells and their copies, once for both tasks"
    run = run_in(home)
    (cells,) = {name.split("/")[1].partition("_")[2] for name in run.data.metrics if name.startswith("probe/restained")}
    kinds = {f"morphometry_{cells}": "pearson", f"restained_{cells}": "recall_at_1"}
    for task, metric in kinds.items():
        values = {part: run.data.metrics[f"probe/{task}/{metric}{part}"] for part in ("", "_low", "_high")}
        assert values["_low"] <= values[""] <= values["_high"]
    assert run.data.metrics[f"probe/morphometry_{cells}/pearson_sd"] >= 0
    names = {each.dataset.name.partition(":")[0] for each in run.inputs.dataset_inputs}
    assert names == {"cells", "morphometry", "restained"}
    for metric in ("morphometry/pearson", "restained/recall_at_1"):
        history = client_of(home).get_metric_history(run.info.run_id, f"online/{metric}")
        assert [point.step for point in history] == [2, 4], "with each checkpoint"
    assert not {"output", "cache"} & run.data.params.keys(), "no difference between runs"
    assert [each.path for each in client_of(home).list_artifacts(run.info.run_id, "probe")] == ["probe/table1.md"]
    version = client_of(home).get_model_version_by_alias("lemon", "newest")
    assert version.run_id == run.info.run_id
    tag = float(version.tags[f"probe/restained_{cells}/recall_at_1"])
    assert tag == pytest.approx(run.data.metrics[f"probe/restained_{cells}/recall_at_1"], abs=1e-4)


@pytest.mark.slow
def test_a_task_that_fails_costs_a_line_and_neither_the_run_nor_the_other_tasks(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"tasks=[consep-type,'restained:{home / 'cells'}']", f"data={home / 'nowhere'}", "register_as=null"]
    assert pretraining.main(config_in(home, *words)) == EXIT_OK
    assert "pretrain: consep-type is not scored: consep-type: no folder" in capsys.readouterr().err
    run = run_in(home)
    assert run.info.status == "FINISHED"
    assert "no folder" in run.data.tags["probe_failed/consep-type"]
    assert any(name.startswith("probe/restained") for name in run.data.metrics)


@pytest.mark.slow
def test_null_scores_nothing_and_a_rerun_with_tasks_scores_without_training_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretraining.main(config_in(home, "tasks=null", "register_as=null")) == EXIT_OK
    assert not any(name.startswith("probe/") for name in run_in(home).data.metrics)
    before = run_in(home).info.run_id
    steps = len(client_of(home).get_metric_history(before, "loss"))
    assert pretraining.main(config_in(home, "register_as=null")) == EXIT_OK
    assert run_in(home).info.run_id == before
    assert any(name.startswith("probe/") for name in run_in(home).data.metrics)
    assert len(client_of(home).get_metric_history(before, "loss")) == steps


@pytest.mark.slow
def test_lemon_probe_logs_to_the_run_that_trained_the_encoder_unless_told_not_to(home: Path) -> None:
    assert pretraining.main(config_in(home, "tasks=null")) == EXIT_OK
    shutil.copytree(home / "cells", home / "other")
    words = {"tasks": [f"restained:{home / 'other'}"], "output": str(home / "probe"), "bootstrap": 100}
    alone = ProbeConfig(models=[str(home / "run")], **words, on_training_run=False, untrained=False)
    assert probing.main(alone) == EXIT_OK
    assert not any(name.startswith("probe/") for name in run_in(home).data.metrics)
    for model in (str(home / "run"), "models:/lemon/1", "models:/lemon@newest"):
        trained_by = training_run_of(model)
        assert trained_by is not None
        assert trained_by.run_id == run_in(home).info.run_id
    assert probing.main(alone.model_copy(update={"on_training_run": True})) == EXIT_OK
    assert any(name.startswith("probe/restained") for name in run_in(home).data.metrics)
    client = client_of(home)
    (probed,) = client.search_runs([client.get_experiment_by_name("probe").experiment_id])
    assert probed.data.tags["training_run_id"] == run_in(home).info.run_id
    assert training_run_of("untrained_vit_s8") is None


def test_a_task_that_is_not_known_is_refused_before_anything_is_written(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"consep-tipe.*did you mean consep-type"):
        config_in(home, "tasks=consep-tipe").check_inputs()
    assert not (home / "run").exists()
    assert config_in(home, "tasks=consep-type").probe_tasks == ["consep-type"]
    assert config_in(home, "tasks=null").probe_tasks == []
