"""What a finished pretraining leaves in MLflow's model registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon import load_encoder
from lemon.config import EXIT_OK, ConfigError, load
from lemon.pretrain import launch
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN
from tests.cells_table import synthetic_crops
from tests.sweeps import TINY, write_cells


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "db").mkdir()
    place = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    return place


def config_in(folder: Path, *words: str) -> PretrainConfig:
    places = [f"cells={folder / 'cells'}", f"output={folder / 'run'}", f"cache={folder / 'cache'}"]
    tiny = [word.removeprefix("pretrain.") for word in TINY]
    return load("pretrain", [*tiny, "epochs=2", *places, *words], PretrainConfig)


@pytest.mark.slow
def test_a_finished_run_is_registered_once_and_opens_from_the_registry_with_the_same_vectors(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    write_cells(tmp_path / "cells")
    config = config_in(tmp_path)
    for _ in range(2):
        assert launch.main(config) == EXIT_OK
        assert "registered in MLflow as models:/lemon/1" in capsys.readouterr().out
    (version,) = mlflow.MlflowClient(uri).search_model_versions("name='lemon'")
    assert version.run_id == Store(config.output).read_json(RUN)["run_id"]
    assert version.tags["views"] == config.views.name
    assert int(version.tags["steps"]) == config.total_steps
    assert version.description == "vit_tiny8-mocov3-a1_gray"
    mlflow.set_tracking_uri(uri)
    model = mlflow.pyfunc.load_model("models:/lemon/1")
    images = synthetic_crops(7)
    np.testing.assert_array_equal(model.predict(images), load_encoder(config.output).embed(images).numpy())
    assert [spec.shape for spec in model.metadata.signature.outputs] == [(-1, config.encoder.dim)]
    assert (tmp_path / "db" / "mlruns").is_dir(), "beside the database, wherever the job was started"


@pytest.mark.slow
def test_null_registers_nothing(tmp_path: Path, uri: str) -> None:
    import mlflow

    write_cells(tmp_path / "cells")
    assert launch.main(config_in(tmp_path, "register_as=null")) == EXIT_OK
    assert not mlflow.MlflowClient(uri).search_registered_models()


def test_the_name_in_the_registry_decides_no_result_and_is_checked_at_once(tmp_path: Path) -> None:
    named, other = config_in(tmp_path, "register_as=a"), config_in(tmp_path, "register_as=b")
    assert named.result_settings() == other.result_settings()
    with pytest.raises(ConfigError, match="register_as"):
        config_in(tmp_path, "register_as=a/b")
