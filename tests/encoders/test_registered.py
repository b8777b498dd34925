"""Encoders opened from MLflow's model registry, by the address that MLflow gives them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lemon
from lemon.encoders.config import VIT_TINY8
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.open import load_encoder
from lemon.encoders.registry import check_name
from lemon.encoders.vit import build_vit
from lemon.errors import ConfigError
from lemon.runtime.store import Store
from lemon.runtime.tracking import start_run
from tests.cells_table import synthetic_crops


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    return tmp_path


def register(folder: Path, *, seed: int) -> int | None:
    """Register a fresh encoder as "nuclei", in a run of its own; returns its version."""
    torch.manual_seed(seed)
    export_encoder(build_vit(VIT_TINY8), folder, cell_input=CellInput(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)))
    run = start_run("pretrain", folder.name, store=Store(folder.parent / "outputs" / folder.name), params={})
    return run.register("nuclei", folder, width=192, tags={})


@pytest.mark.slow
def test_a_registered_encoder_opens_by_its_version_and_by_its_alias(here: Path) -> None:
    import mlflow

    folders = [here / "one", here / "two"]
    assert [register(folder, seed=seed) for seed, folder in enumerate(folders)] == [1, 2]
    database = f"sqlite:///{here / 'runs' / 'mlflow.db'}"
    client = mlflow.MlflowClient(database, registry_uri=database)  # else the one that a test before may have set
    client.set_registered_model_alias("nuclei", "best", "2")
    images = synthetic_crops(3)
    expected = [load_encoder(folder).embed(images) for folder in folders]
    first = lemon.load_encoder("models:/nuclei/1")
    torch.testing.assert_close(first.embed(images), expected[0], rtol=0, atol=0)
    assert first.name == "nuclei-1"
    torch.testing.assert_close(lemon.load_encoder("models:/nuclei@best").embed(images), expected[1], rtol=0, atol=0)
    check_name("models:/nuclei/1")  # opens nothing, so it may be any name
    for absent in ("models:/nuclei/3", "models:/nobody/1", "models:/nuclei@worst", "models:/"):
        with pytest.raises(ConfigError, match=r"^encoder: models:/") as told:
            load_encoder(absent)
        assert "\n" not in str(told.value)


@pytest.mark.slow
def test_a_model_that_is_no_encoder_is_one_line(here: Path) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    (here / "runs").mkdir()
    (here / "model.py").write_text(
        "from mlflow.models import set_model\nfrom mlflow.pyfunc import PythonModel\n\n\n"
        "class Other(PythonModel):\n    def predict(self, context, model_input, params=None):\n"
        "        return model_input\n\n\nset_model(Other())\n"
    )
    with mlflow.start_run():
        mlflow.pyfunc.log_model(name="m", python_model="model.py", registered_model_name="other")
    with pytest.raises(ConfigError, match=r"^encoder: models:/other/1 is no encoder that lemon pretrain registered$"):
        load_encoder("models:/other/1")


def test_where_there_is_no_mlflow_the_line_says_which_was_asked_and_none_is_made(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"^encoder: models:/nuclei/1: there is no sqlite:///.*MLFLOW_TRACKING_URI"):
        load_encoder("models:/nuclei/1")
    assert list(here.iterdir()) == []
