from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lemon.cells.images import ImagesInMemory, read_images
from lemon.cells.shard import images_from_arrow
from lemon.encoders import features, vit
from lemon.encoders.attention import CellAttention
from lemon.encoders.export import NotFiniteError
from lemon.encoders.features import effective_rank
from lemon.encoders.mlp import CellMlp
from lemon.errors import ConfigError
from lemon.pretrain import online_probe
from lemon.pretrain.assemble import build_trainer, export, select, train
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.loop import Trainer, TrainingStoppedError
from lemon.pretrain.online_probe import LABELLED_METRIC, labelled_task
from lemon.runtime.store import Store
from lemon.views.policy import load_policy
from tests.cells_table import synthetic_crops, write_slide

pytestmark = pytest.mark.usefixtures("console")

CPU = torch.device("cpu")
TINY = {"name": "tiny", "dim": 32, "depth": 2, "heads": 2}
MOCO = {"name": "mocov3", "hidden_dim": 32, "out_dim": 16, "warmup_epochs": 1}
DINO = {
    "name": "dinov2", "hidden_dim": 32, "bottleneck_dim": 16, "prototypes": 64, "local_crops": 2, "warmup_epochs": 1,
    "head_dim": 16, "drop_path": 0.2,
}  # fmt: skip

KDE = DINO | {"local_to_global": False, "regulariser": "kde"}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells")
    for slide in range(3):
        write_slide(Store(folder), f"s{slide}", synthetic_crops(40, seed=slide))
    return folder


def config_for(cells: Path, output: Path, **changes: Any) -> PretrainConfig:
    values = {
        "cells": str(cells), "output": str(output), "ssl": MOCO, "encoder": TINY, "views": load_policy("a1_gray"),
        "epochs": 3, "images_per_epoch": 64, "batch": 16, "log_every": 1, "checkpoint_every": 4,
        "cache": str(output / "cache"),
    }  # fmt: skip
    return PretrainConfig.model_validate(values | changes)


@pytest.mark.slow
@pytest.mark.parametrize("ssl", [MOCO, DINO, KDE], ids=["mocov3", "dinov2", "kde"])
def test_fifty_steps_without_a_gpu_equal_those_of_timms_own_network_bit_for_bit(
    cells: Path, tmp_path: Path, ssl: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, timms = Recorder(), Recorder()
    settings = {"ssl": ssl, "epochs": 7, "batch": 8, "checkpoint_every": 1000}
    trainer_for(config_for(cells, tmp_path / "a", **settings), ours).run(until=50)
    for kind in (vit.CellTransformer, CellAttention, CellMlp):
        monkeypatch.delattr(kind, "forward")
    monkeypatch.setattr(vit, "block_of", lambda block, tokens, *, class_only=False: block(tokens))
    trainer_for(config_for(cells, tmp_path / "b", **settings), timms).run(until=50)
    assert len(ours.losses()) == 50
    assert ours.losses() == timms.losses()


class Recorder:
    """Keeps what a run logs."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(metrics)

    def losses(self) -> list[float]:
        return [row["loss"] for _, row in sorted(self.rows.items()) if "loss" in row]


def trainer_for(config: PretrainConfig, log: Recorder | None = None) -> Trainer:
    return build_trainer(config, device=CPU, log=log)


def test_a_run_from_the_cache_equals_one_from_memory_bit_for_bit(cells: Path, tmp_path: Path) -> None:
    cached, memory = Recorder(), Recorder()
    trainer_for(config_for(cells, tmp_path / "a"), cached).run()
    config = config_for(cells, tmp_path / "b")
    trainer = trainer_for(config, memory)
    trainer.feed.images = ImagesInMemory(read_images(select(config)))
    trainer.run()
    assert len(cached.losses()) == 12
    assert cached.losses() == memory.losses()


@pytest.mark.parametrize(
    ("ssl", "cache_gb"), [(MOCO, 1), (DINO, 1), (MOCO, 0)], ids=["mocov3", "dinov2", "mocov3, streamed"]
)
def test_a_run_that_was_interrupted_equals_one_that_was_not_bit_for_bit(
    cells: Path, tmp_path: Path, ssl: dict, cache_gb: int
) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    undisturbed = trainer_for(config_for(cells, tmp_path / "a", ssl=ssl, cache_gb=cache_gb), whole)
    undisturbed.run()
    config = config_for(cells, tmp_path / "b", ssl=ssl, cache_gb=cache_gb)
    trainer_for(config, first).run(until=7)  # dies after step 7; checkpoints are of steps 4 and 7
    (tmp_path / "b" / "checkpoints" / "step-00000007.pt").unlink()
    resumed = trainer_for(config, second)
    assert resumed.resume() == 4
    resumed.run()
    assert first.losses() == whole.losses()[:7]
    assert second.losses() == whole.losses()[4:]
    for one, other in zip(undisturbed.method.state_dict().values(), resumed.method.state_dict().values(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(one, other)


def test_a_full_disk_stops_a_run_with_its_reason_and_the_same_run_goes_on_later(cells: Path, tmp_path: Path) -> None:
    config = config_for(cells, tmp_path)
    trainer_for(config).run(until=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # a checkpoint is larger
    try:
        with pytest.raises(TrainingStoppedError, match=r"storage failed at step 8: .*File too large"):
            train(config, device=CPU)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Checkpoints(Store(tmp_path)).steps() == [4]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    train(config, device=CPU)
    assert (tmp_path / "encoder" / "model.safetensors").exists()


def test_another_seed_is_another_run(cells: Path, tmp_path: Path) -> None:
    losses = []
    for seed in (0, 1):
        log = Recorder()
        trainer_for(config_for(cells, tmp_path / str(seed), seed=seed), log).run(until=2)
        losses.append(log.losses())
    assert losses[0] != losses[1]


def test_what_is_logged_tells_loss_rate_waiting_and_signs_of_collapse(cells: Path, tmp_path: Path) -> None:
    log = Recorder()
    trainer_for(config_for(cells, tmp_path), log).run(until=4)
    wanted = {"loss", "lr", "images_per_s", "data_wait_share", "feature_std", "effective_rank", "epoch", "momentum"}
    assert wanted <= log.rows[4].keys()
    assert 0 <= log.rows[4]["data_wait_share"] <= 1
    assert log.rows[4]["effective_rank"] > 1.5


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    cells: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(config_for(cells, tmp_path))
    trainer.run(until=4)
    with torch.no_grad():
        next(trainer.method.projector.parameters()).fill_(float("nan"))  # type: ignore[attr-defined]
    with pytest.raises(TrainingStoppedError, match=r"the loss became nan.*last good checkpoint is of step 4"):
        trainer.run()
    assert Checkpoints(Store(tmp_path)).steps() == [4]


def test_collapsed_features_stop_the_run(cells: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(cells, tmp_path))
    with torch.no_grad():
        trainer.method.encoder.norm.weight.zero_()  # type: ignore[union-attr, operator]
        trainer.method.encoder.norm.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingStoppedError, match="features collapsed"):
        trainer.run(until=4)
    assert Checkpoints(Store(tmp_path)).steps() == []


def test_weights_that_the_last_update_broke_are_never_a_checkpoint(cells: Path, tmp_path: Path) -> None:
    """The loss and the features were finite: the teacher's projector decides on neither."""
    trainer = trainer_for(config_for(cells, tmp_path))
    trainer.run(until=4)
    for images in trainer.feed.batches(4, 5):
        trainer.train_step(images)
    with torch.no_grad():
        next(trainer.method.teacher_projector.parameters())[0, 0] = float("inf")  # type: ignore[attr-defined]
    with pytest.raises(TrainingStoppedError, match=r"method\.teacher_projector.*is not finite at step 5.*of step 4"):
        trainer._checkpoint()
    assert Checkpoints(Store(tmp_path)).steps() == [4]


def test_an_encoder_that_is_not_finite_is_not_exported_and_the_earlier_one_stays(cells: Path, tmp_path: Path) -> None:
    config = config_for(cells, tmp_path)
    train(config, device=CPU)
    before = {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir() if path.is_file()}
    trainer = trainer_for(config)
    trainer.resume()
    with torch.no_grad():
        trainer.method.encoder.blocks[1].mlp.fc1.weight[0, 0] = float("nan")  # type: ignore[index, union-attr, operator]
    with pytest.raises(NotFiniteError, match=r"1 of \d+ tensors hold values that are not finite \(blocks\.1"):
        export(trainer, config)
    assert {path.name: path.read_bytes() for path in (tmp_path / "encoder").iterdir() if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "NaN"])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_and_no_more(
    cells: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    whole, second = Recorder(), Recorder()
    trainer_for(config_for(cells, tmp_path / "a"), whole).run()
    config = config_for(cells, tmp_path / "b", keep_checkpoints=1)
    for until in (4, 7):
        trainer = trainer_for(config.model_copy(update={"keep_checkpoints": 2}))
        trainer.resume()
        trainer.run(until=until)
    newest = tmp_path / "b" / "checkpoints" / "step-00000007.pt"
    content = bytearray(newest.read_bytes())
    if damage == "NaN":
        trainer.method.encoder.norm.bias.data[0] = float("nan")  # type: ignore[union-attr, index]
        state = {"method": trainer.method.state_dict(), "optimizer": trainer._optimizer.state_dict()}
        trainer.checkpoints.save(state, step=7)
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    resumed = trainer_for(config, second)
    assert resumed.resume() == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"pretrain: training goes on from step 4; put aside as damaged: {tmp_path}/b/damaged/step-00000007-"
    )
    resumed.run(until=6)
    assert resumed.checkpoints.steps() == [6]
    resumed.run(until=7)  # where the damaged one was
    resumed.run()
    assert second.losses() == whole.losses()[4:]


def test_features_that_are_not_finite_have_no_effective_rank() -> None:
    """The loop then stops with its own line, before a broken state is saved."""
    features = torch.randn(20, 4)
    features[3, 1] = float("nan")
    assert effective_rank(features).isnan()


def test_a_checkpoint_holds_all_that_is_needed_to_go_on(cells: Path, tmp_path: Path) -> None:
    trainer = trainer_for(config_for(cells, tmp_path))
    trainer.run(until=4)
    state, _ = trainer.checkpoints.newest()
    assert state is not None
    assert set(state) == {"method", "optimizer", "config", "step"}
    names = set(state["method"])
    assert all(
        any(name.startswith(part) for name in names) for part in ("encoder.", "teacher.", "projector.", "predictor.")
    )
    assert json.loads(state["config"])["ssl"]["name"] == "mocov3"


def test_the_exported_encoder_opens_in_timm_and_gives_the_same_features(cells: Path, tmp_path: Path) -> None:
    import timm

    config = config_for(cells, tmp_path)
    trainer = trainer_for(config)
    trainer.run(until=2)
    export(trainer, config)
    images = torch.randn(3, 3, 40, 40)
    opened = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.allclose(opened(images), trainer.method.exported.eval()(images), atol=1e-5)


def labels_of_brightness(cells: Path, folder: Path) -> Path:
    """A table that says of each cell whether its nucleus is brighter than half of its slide's."""
    store, rows = Store(cells), []
    for name in store.list("cells"):
        table = store.read_table(name, columns=["cell_id", "image"])
        bright = images_from_arrow(table["image"])[:, 20:40, 20:40].mean(axis=(1, 2, 3))
        rows += [
            f"{cell_id},{value > np.median(bright)}"
            for cell_id, value in zip(table["cell_id"].to_pylist(), bright, strict=True)
        ]
    labels = folder / "labels.csv"
    labels.write_text("cell_id,label\n" + "\n".join(rows) + "\n")
    return labels


def test_checkpoints_are_scored_on_labelled_cells_and_without_labels_and_the_best_is_kept(
    cells: Path, tmp_path: Path
) -> None:
    labels, log = labels_of_brightness(cells, tmp_path), Recorder()
    trainer_for(config_for(cells, tmp_path, probe={"labels": str(labels), "n_cells": 60}), log).run(until=4)
    assert 0.5 < log.rows[4][LABELLED_METRIC] <= 1
    assert 0 <= log.rows[4]["online/restained/recall_at_1"] <= 1
    assert Checkpoints(Store(tmp_path)).best()[0] == 4


@pytest.mark.parametrize("ssl", [MOCO, DINO], ids=["mocov3", "dinov2"])
def test_scores_at_checkpoints_or_their_failure_change_no_loss_by_a_bit(
    cells: Path, tmp_path: Path, ssl: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_all(name: str, **changes: Any) -> Recorder:
        log = Recorder()
        trainer_for(config_for(cells, tmp_path / name, ssl=ssl, checkpoint_every=3, **changes), log).run()
        return log

    without, scored = train_all("a", probe=None), train_all("b")
    assert "online" not in str(without.rows)
    assert [step for step, row in scored.rows.items() if "online/restained/recall_at_1" in row] == [3, 6, 9, 12]

    def fail(encoder: torch.nn.Module, *_: Any, **__: Any) -> None:
        features.encode_cells(encoder, cells_that_are_none, mean=[0] * 3, std=[1] * 3, crop_px=40)

    cells_that_are_none = torch.full((2, 60, 60, 3), float("nan"))
    monkeypatch.setattr(online_probe, "encode_cells", fail)
    capsys.readouterr()
    failed = train_all("c")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" is not scored: ")[0] for line in lines] == [
        f"pretrain: the encoder of step {step}" for step in (3, 6, 9, 12)
    ]
    assert without.losses() == scored.losses() == failed.losses()


def test_cells_without_measures_cost_a_line_and_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_slide(Store(tmp_path / "cells"), "alone", synthetic_crops(8))
    log = Recorder()
    config = config_for(tmp_path / "cells", tmp_path / "run", batch=4, images_per_epoch=8, checkpoint_every=2)
    trainer_for(config, log).run(until=2)
    assert "pretrain: checkpoints are not scored on restained:" in capsys.readouterr().err
    assert log.rows[2]["effective_rank"] > 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "no such file"),
        ("id,label\na,b\n", "expected cell_id, label"),
        ("cell_id,label\nnobody,b\n", "got 0 labelled cells"),
    ],
)
def test_labels_that_cannot_be_used_are_told_in_one_line(
    cells: Path, tmp_path: Path, content: str | None, part: str
) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_text(content)
    config = config_for(cells, tmp_path, probe={"cells": str(cells), "labels": str(path)})
    with pytest.raises(ConfigError, match=part):
        labelled_task(config)
