"""What a finished pretraining leaves in MLflow's model registry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lemon import load_encoder
from lemon.cells import cache
from lemon.errors import EXIT_OK, ConfigError, StorageError
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.loop import TrainingStoppedError
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.runtime.tracking import RUN
from tests.cells_table import synthetic_crops
from tests.sweep.studies import TINY, write_cells

pytestmark = pytest.mark.usefixtures("console")


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "db").mkdir()
    place = f"sqlite:///{tmp_path / 'db' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    return place


def config_in(folder: Path, *words: str) -> PretrainConfig:
    places = [f"cells={folder / 'cells'}", f"output={folder / 'run'}", f"cache={folder / 'cache'}"]
    tiny = [word.removeprefix("pretrain.") for word in TINY]
    return load("pretrain", [*tiny, "epochs=2", "tasks=null", *places, *words], PretrainConfig)


@pytest.mark.slow
def test_a_finished_run_is_registered_once_and_opens_from_the_registry_with_the_same_vectors(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    write_cells(tmp_path / "cells")
    config = config_in(tmp_path)
    for _ in range(2):
        assert pretraining.main(config) == EXIT_OK
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
    assert pretraining.main(config_in(tmp_path, "register_as=null")) == EXIT_OK
    assert not mlflow.MlflowClient(uri).search_registered_models()


def test_the_name_in_the_registry_decides_no_result_and_is_checked_at_once(tmp_path: Path) -> None:
    named, other = config_in(tmp_path, "register_as=a"), config_in(tmp_path, "register_as=b")
    assert named.result_settings() == other.result_settings()
    with pytest.raises(ConfigError, match="register_as"):
        config_in(tmp_path, "register_as=a/b")


def refused(config: PretrainConfig) -> str:
    with pytest.raises((ConfigError, StorageError)) as told:
        pretraining.main(config)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_what_the_data_or_this_machine_refute_is_told_before_anything_is_written(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cells(tmp_path / "cells")
    (tmp_path / "file").write_text("")
    labels = tmp_path / "labels.csv"
    labels.write_text("cell_id,label\nnobody,x\n")
    stain = tmp_path / "cells" / "stain_lab_gmm1.json"
    probe = [f"probe={{cells: {tmp_path / 'cells'}, labels: {labels}}}"]
    assert "cells: got 3; expected 4 at least" in refused(config_in(tmp_path, "select.n_cells=3"))
    assert "device: got 'cuda:99'" in refused(config_in(tmp_path, "device=cuda:99"))
    assert "cache: cannot write" in refused(config_in(tmp_path, f"cache={tmp_path / 'file'}"))
    assert "probe.labels: got 0 labelled cells" in refused(config_in(tmp_path, *probe))
    assert "views.stain.statistics" in refused(config_in(tmp_path, "views=a1_gmm1"))
    stain.write_text("{")
    assert "views.stain.statistics" in refused(config_in(tmp_path, "views=a1_gmm1")).replace(
        " statistics", ".statistics"
    )
    stain.unlink()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    assert "images of 0.001 GB are to be written" in refused(config_in(tmp_path))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
    assert not list((tmp_path / "db").iterdir())


def test_a_users_file_where_the_encoder_is_to_be_is_told_before_training(tmp_path: Path, uri: str) -> None:
    write_cells(tmp_path / "cells")
    for name in ("encoder/config.json", "checkpoints/step-00000002.pt", "pretrain.json"):
        file = tmp_path / "run" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        assert "move it away, or choose another output" in refused(config_in(tmp_path))
        assert file.read_text() == "mine"
        file.unlink()


def tell_of_nan(*_: object, **__: object) -> None:
    raise TrainingStoppedError("the loss became nan")


@pytest.mark.slow
def test_an_output_in_which_nothing_was_made_takes_new_settings_and_a_run_of_its_own(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cells(tmp_path / "cells")
    runs = []
    for seed in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(pretraining, "train", tell_of_nan)
            with pytest.raises(TrainingStoppedError):
                pretraining.main(config_in(tmp_path, f"seed={seed}", "register_as=null"))
        runs.append(Store(tmp_path / "run").read_json(RUN)["run_id"])
    assert runs[0] != runs[1]
    assert pretraining.main(config_in(tmp_path, "seed=2", "register_as=null")) == EXIT_OK
    assert Store(tmp_path / "run").read_json(RUN)["run_id"] == runs[1], "the same settings go on in the same run"
    told = refused(config_in(tmp_path, "seed=3", "register_as=null"))
    assert "was begun with other settings (seed 2 then, 3 now); choose another output" in told


def test_an_output_keeps_its_order_of_cells(tmp_path: Path, uri: str) -> None:
    write_cells(tmp_path / "cells")
    assert pretraining.main(config_in(tmp_path, "register_as=null")) == EXIT_OK
    assert "other settings (order permuted then, streamed now)" in refused(config_in(tmp_path, "cache_gb=0"))
    settings = Store(tmp_path / "run").read_json("pretrain.json")
    Store(tmp_path / "run").write_json("pretrain.json", {key: settings[key] for key in settings if key != "order"})
    assert "other settings (order None then, permuted now)" in refused(config_in(tmp_path)), "of an earlier version"


def test_a_moved_table_goes_on_and_another_one_at_its_place_does_not(tmp_path: Path, uri: str) -> None:
    write_cells(tmp_path / "cells")
    assert pretraining.main(config_in(tmp_path, "register_as=null")) == EXIT_OK
    (tmp_path / "cells").rename(tmp_path / "moved")
    again = config_in(tmp_path, "register_as=null", f"cells={tmp_path / 'moved'}")
    assert pretraining.main(again) == EXIT_OK
    write_cells(tmp_path / "cells", per_slide=21)
    assert "other settings (cells " in refused(config_in(tmp_path, "register_as=null"))


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_ends_well_again_and_keeps_it(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cells(tmp_path / "cells")
    config = config_in(tmp_path, "register_as=null")
    assert pretraining.main(config) == EXIT_OK
    encoder = (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes()
    newest = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    content = bytearray(newest.read_bytes())
    content[5000:5040] = bytes(byte ^ 0xFF for byte in content[5000:5040])
    newest.write_bytes(content)
    for told in (["pretrain: training goes on from step 2; put aside as damaged: "], []):
        capsys.readouterr()
        assert pretraining.main(config) == EXIT_OK
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: ")]
        assert [line[: len(start)] for line, start in zip(lines, told, strict=True)] == told
    assert (tmp_path / "run" / "encoder" / "model.safetensors").read_bytes() == encoder
    (aside,) = (tmp_path / "run" / "damaged").iterdir()
    assert aside.read_bytes() == bytes(content)
