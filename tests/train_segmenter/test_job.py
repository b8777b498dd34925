from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lemon.errors import EXIT_OK, ConfigError
from lemon.nuclei.hoverfast import load_checkpoint
from lemon.nuclei.training.images import split
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.train_segmenter.config import TrainSegmenterConfig
from lemon.train_segmenter.job import main
from lemon.train_segmenter.train import CARD, WEIGHTS, read_images, train
from tests.nuclei.training.made_up import labelled, stored

TINY = ["width=4", "batch=2", "window_px=64", "warmup_steps=3", "learning_rate=1e-2", "average=0.9", "device=cpu"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, source in enumerate("aaabb"):
        stored(tmp_path / "data" / source, labelled(size_px=112, seed=seed))
    return tmp_path / "data"


def config_in(folder: Path, data: Path, *words: str) -> TrainSegmenterConfig:
    places = [f"data=[{data / 'a'},{data / 'b'}]", f"output={folder}"]
    return load("train_segmenter", [*places, *TINY, *words], TrainSegmenterConfig)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "console")
def test_held_out_images_are_met_better_after_training_and_all_is_on_disk_and_in_mlflow(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"sqlite:///{tmp_path / 'mlflow.db'}")
    config = config_in(tmp_path / "out", data, "steps=70", "check_every=5", "log_every=5", "keep_checkpoints=1")
    assert main(config) == EXIT_OK
    run_id = Store(config.output).read_json("run.json")["run_id"]
    client = mlflow.MlflowClient(uri)
    for source in "ab":
        history = [m.value for m in client.get_metric_history(run_id, f"f1/{source}")]
        assert len(history) == 14
        assert history[-1] > max(history[0], 0.5), history
    losses = [m.value for m in client.get_metric_history(run_id, "loss")]
    assert losses[-1] < 0.6 * losses[0]
    pictures = client.list_artifacts(run_id, "worst")
    assert [Path(p.path).name for p in pictures][-1] == "step-00000070.png"
    net = load_checkpoint(tmp_path / "out" / WEIGHTS)
    assert net.architecture.wf == 2
    with safe_open(tmp_path / "out" / WEIGHTS, "pt") as weights:
        assert json.loads(weights.metadata()["architecture"])["wf"] == 2
    card = (tmp_path / "out" / CARD).read_text()
    assert "| a | 2 |" in card
    assert main(config) == EXIT_OK, "a rerun of what is done is done"
    assert torch.equal(next(net.parameters()), next(load_checkpoint(tmp_path / "out" / WEIGHTS).parameters()))


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_was_cut_off_ends_with_the_weights_of_one_that_was_not(data: Path, tmp_path: Path) -> None:
    class CutOffError(Exception):
        pass

    def cut_off(metrics: object, step: int) -> None:
        if step == 3:
            raise CutOffError

    words = ["steps=4", "check_every=2", "log_every=1", "checked_px=64"]
    whole, cut = (config_in(tmp_path / name, data, *words) for name in ("whole", "cut"))
    images, cpu = read_images(whole), torch.device("cpu")
    train(whole, images, device=cpu)
    with pytest.raises(CutOffError):
        train(cut, images, device=cpu, log=cut_off)
    train(cut, images, device=cpu)
    expected, got = (load_checkpoint(tmp_path / name / WEIGHTS).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_teacher_labels_images_that_have_no_labels(data: Path, tmp_path: Path) -> None:
    (image, *_) = read_images(config_in(tmp_path / "out", data, "teacher=hematoxylin"))
    drawn = next(i for i in read_images(config_in(tmp_path / "out", data)) if i.name == image.name)
    assert image.instances.shape == drawn.instances.shape
    assert ((image.instances > 0) == (drawn.instances > 0)).mean() > 0.7


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data=nowhere"], "data: got '.*nowhere'; expected a folder"),
        (["teacher=hematoxylim"], "teacher: got 'hematoxylim'; expected one of .* did you mean hematoxylin"),
        (["window_px=100"], "window_px: got 100; expected a multiple of 32"),
        (["batch=1", "workers.count=2"], "batch: got 1; expected a window for each of 2 workers"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(words: list[str], told: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        config_in(tmp_path / "out", data, *words).check_inputs()


def test_images_without_labels_and_without_nuclei_are_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="bare: no labelled images"):
        read_images(config_in(tmp_path / "out", data, f"data={tmp_path / 'bare'}"))
    np.savez_compressed(tmp_path / "bare/0_inst.npz", inst_map=np.zeros((112, 112), np.uint16))
    (tmp_path / "bare/0.png").write_bytes((data / "a/0.png").read_bytes())
    config = config_in(tmp_path / "out", data, f"data={tmp_path / 'bare'}")
    with pytest.raises(ConfigError, match="0% of the pixels are nuclei"):
        train(config, read_images(config), device=torch.device("cpu"))


def test_images_are_held_out_of_every_source(data: Path, tmp_path: Path) -> None:
    kept, held_out = split(read_images(config_in(tmp_path / "out", data)), held_out_share=0.08)
    assert sorted(image.source for image in held_out) == ["a", "b"]
    assert len(kept) == 3
