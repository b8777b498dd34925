"""Settings that cannot be trained with are told by the config, each with its key, before anything is read or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lemon.cells.batches import Feed
from lemon.cells.images import ImagesInMemory
from lemon.cells.order import Permutation
from lemon.errors import ConfigError
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.config import DINOv2Config, PretrainConfig
from lemon.pretrain.dinov2 import DINOv2
from lemon.pretrain.loop import Trainer
from lemon.runtime.config import load, preset_names, validate
from lemon.runtime.store import Store
from lemon.sweep.config import SweepConfig
from lemon.views.policy import load_policy
from tests.cells_table import synthetic_crops

BASE = ["cells=c", "output=o", "variant=smoke"]
DINO = ["ssl=dinov2", "ssl.head_dim=64", "ssl.warmup_epochs=1"]

REFUSED = {
    "warmup that never ends": (["ssl.warmup_epochs=10"], "ssl.warmup_epochs: got 10.0; expected less than epochs=10"),
    "the variant's warmup": (["epochs=0.5"], "ssl.warmup_epochs: got 1.0; expected less than epochs=0.5"),
    "frozen to the end": (
        [*DINO, "epochs=1", "ssl.warmup_epochs=0", "ssl.freeze_last_layer_epochs=1"],
        "ssl.freeze_last_layer_epochs: got 1.0; expected",
    ),
    "no step": (["epochs=0.01", "ssl.warmup_epochs=0"], "epochs: got 0.01; expected 0.1 at least"),
    "endless": (["epochs=inf"], "epochs: got inf; expected"),
    "no number": (["epochs=nan"], "epochs: "),
    "infinite temperature": (["ssl.temperature=inf"], "ssl.temperature: got inf; expected"),
    "no batch": (["batch=1"], "batch: got 1; expected greater than or equal to 2"),
    "fewer cells than two a worker": (["batch=4", "workers.count=3"], "batch: got 4; expected 2 cells at least"),
    "the same, elastic": (["batch=4", "workers.count=[1,3]"], "batch: got 4; expected 2 cells at least"),
    "no worker": (["workers.count=0"], "workers.count: got 0; expected 1 or more"),
    "less than none": (["workers.count=[0,2]"], "workers.count: got [0, 2]; expected"),
    "falling": (["workers.count=[3,1]"], "workers.count: got [3, 1]; expected"),
    "workers in words": (["workers.count=two"], "workers.count: got 'two'; expected"),
    "three numbers": (["workers.count=[1,2,3]"], "workers.count: got [1, 2, 3]; expected"),
    "one GPU and a half": (["workers.gpus=1.5"], "workers.gpus: got 1.5; expected a share"),
    "never a checkpoint": (["checkpoint_every=0"], "checkpoint_every: got 0; expected"),
    "never a line": (["log_every=0"], "log_every: got 0; expected"),
    "keeps none": (["keep_checkpoints=0"], "keep_checkpoints: got 0; expected"),
    "seed below 0": (["seed=-1"], "seed: got -1; expected"),
    "seed beyond torch's": (["seed=99999999999999999999"], "seed: got 99999999999999999999; expected"),
    "no device": (["device=gpu"], "device: "),
    "heads that do not divide": (["encoder.heads=5"], "encoder.heads: got 5; expected a divisor of encoder.dim=192"),
    "dim of odd heads": ([*DINO, "encoder.dim=200"], "ssl.head_dim: got 64; expected one that divides encoder.dim=200"),
    "patches that do not divide": (["encoder.patch_px=7"], "encoder.patch_px: got 7; expected a divisor"),
    "another crop": (["encoder.crop_px=48"], "encoder.crop_px: got 48; expected 40"),
    "local crop of no patches": ([*DINO, "ssl.local_crop_px=20"], "ssl.local_crop_px: got 20; expected a multiple"),
    "local crop above the view": ([*DINO, "ssl.local_crop_px=48"], "ssl.local_crop_px: got 48; expected"),
    "local term without crops": ([*DINO, "ssl.local_crops=0"], "ssl.local_crops: got 0; expected 1 at least"),
    "nothing to learn": (
        [*DINO, "ssl.global_weight=0", "ssl.local_weight=0", "ssl.ibot_weight=0", "ssl.regulariser=none"],
        "ssl.global_weight: got 0.0; expected one weight above 0",
    ),
    "teacher of no temperature": ([*DINO, "ssl.teacher_temperature=[0,0.07]"], "ssl.teacher_temperature.0: got 0"),
    "masks above all": ([*DINO, "ssl.mask_ratio=[0.1,1.5]"], "ssl.mask_ratio.1: got 1.5; expected"),
    "masks that fall": ([*DINO, "ssl.mask_ratio=[0.5,0.1]"], "ssl.mask_ratio: expected [low, high]"),
    "negative decay": ([*DINO, "ssl.weight_decay=[-1,0.4]"], "ssl.weight_decay.0: got -1; expected"),
    "betas of 1": (["ssl.betas=[0.9,1]"], "ssl.betas.1: got 1; expected less than 1"),
    "a kernel beyond the view": (
        ["views.view_a.blur.kernel_px=81"],
        "views.view_a.blur.kernel_px: got 81; expected less",
    ),
    "beyond the local view": (
        [*DINO, "views.view_a.blur.kernel_px=49"],
        "views.view_a.blur.kernel_px: got 49; expected",
    ),
    "crops of no width": (["views.view_a.crop.ratio=[0.001,0.002]"], "views.view_a.crop.ratio.0: got 0.001; expected"),
    "an empty path": (["cells="], "cells: "),
    **{
        f"a registered name with {name!r}": ([f"register_as={name}"], "register_as: got ")
        for name in ("a/b", "a:b", "a.b", "a%b", "..", "' '", "x" * 201)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_with_is_told_with_its_key(case: str) -> None:
    words, part = REFUSED[case]
    given = [word.partition("=")[0] for word in words]
    with pytest.raises(ConfigError) as told:
        load("pretrain", [*(word for word in BASE if word.partition("=")[0] not in given), *words], PretrainConfig)
    assert any(line.startswith(part) for line in str(told.value).splitlines()), told.value


def test_all_that_does_not_fit_together_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        load("pretrain", [*BASE, "ssl.warmup_epochs=99", "encoder.heads=5", "encoder.patch_px=7"], PretrainConfig)
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize("variant", ["default", "smoke"])
@pytest.mark.parametrize("encoder", preset_names("encoder"))
@pytest.mark.parametrize("ssl", preset_names("ssl"))
def test_every_shipped_combination_fits_together(variant: str, encoder: str, ssl: str) -> None:
    words = ["cells=c", "output=o", f"variant={variant}", f"encoder={encoder}", f"ssl={ssl}"]
    assert load("pretrain", words, PretrainConfig).encoder.name == encoder


@pytest.mark.parametrize("ssl", ["mocov3", "dinov2"])
def test_a_warmup_that_nobody_gave_shrinks_with_a_short_run_and_one_that_was_given_stays(ssl: str) -> None:
    def durations(*words: str) -> dict[str, float]:
        config = load("pretrain", ["cells=c", "output=o", f"ssl={ssl}", *words], PretrainConfig)
        again = validate(config.model_dump(mode="json"), PretrainConfig)  # as a worker gets it
        assert again.ssl == config.ssl
        return {name: getattr(config.ssl, name) for name in config.ssl.durations}

    full = durations()
    assert full["warmup_epochs"] == {"mocov3": 40, "dinov2": 10}[ssl]
    assert durations("epochs=300") == full
    assert durations("epochs=15") == pytest.approx({name: value / 10 for name, value in full.items()})
    given = durations("epochs=15", "ssl.warmup_epochs=7")
    assert given == pytest.approx({name: value / 10 for name, value in full.items()} | {"warmup_epochs": 7})


@pytest.mark.parametrize("name", ["lemon", "lemon-2", "Lemon nuclei", "zitrone_größe"])
def test_a_name_that_mlflow_takes_is_taken(name: str) -> None:
    from mlflow.utils.validation import _validate_logged_model_name, _validate_model_name

    assert load("pretrain", [*BASE, f"register_as={name}"], PretrainConfig).register_as == name
    _validate_model_name(name)
    _validate_logged_model_name(name)


def test_a_sweeps_seeds_and_probes_are_checked_and_tasks_are_done_once() -> None:
    base = ["cells=c", "output=o", "variant=smoke"]
    for word, part in (
        ("seeds=[0,-1]", "seeds.1: got -1; expected"),
        ("probe.probes=[knn]", "probe.probes: got ['knn']; expected linear among them"),
        ("probe.protocols=[]", "probe.protocols: "),
        ("asha_settings.grace_share=nan", "asha_settings.grace_share: "),
    ):
        with pytest.raises(ConfigError) as told:
            load("scaling_sweep", [*base, "tasks=amibr", word], SweepConfig)
        assert str(told.value).startswith(part)
    assert load("scaling_sweep", [*base, "tasks=[amibr,amibr]"], SweepConfig).tasks == ["amibr"]


CHOICES: dict[str, list[Any]] = {
    "ssl.local_crops": [0, 1, 3],
    "ssl.local_to_global": [True, False],
    "ssl.local_crop_px": [8, 16, 20, 24, 40],
    "ssl.global_weight": [None, 0, 1],
    "ssl.ibot_weight": [0, 1],
    "ssl.mask_probability": [0, 0.1, 1],
    "ssl.mask_ratio": [(0, 0), (0, 1), (0.1, 0.5), (1, 1)],
    "ssl.separate_ibot_head": [True, False],
    "ssl.regulariser": ["koleo", "kde", "none"],
    "ssl.centering": ["softmax", "sinkhorn"],
    "ssl.chunk": [None, 1, 3],
    "ssl.head_dim": [None, 8, 16, 64],
    "ssl.layer_scale": [None, 1e-5],
    "ssl.teacher_temperature_epochs": [0, 30],
    "ssl.freeze_last_layer_epochs": [0, 1],
    "ssl.warmup_epochs": [0, 1],
    "views.view_a.blur.kernel_px": [3, 15, 47, 79],
    "views.view_a.crop.ratio": [(1 / 40, 1 / 40), (40, 40), (0.75, 1.33)],
    "views.view_a.crop.scale": [(1e-6, 1e-6), (1, 1)],
    "views.view_a.erasing.ratio": [(1 / 40, 1 / 40), (40, 40)],
    "encoder.dim": [4, 8, 24, 32],
    "encoder.heads": [1, 2, 3],
    "encoder.patch_px": [4, 5, 8, 10, 20, 40],
    "epochs": [0.5, 1.5, 3],
    "images_per_epoch": [1, 8],
    "batch": [2, 3, 8],
}


@pytest.mark.slow
def test_every_combination_that_is_taken_trains_with_finite_losses(tmp_path: Path) -> None:
    random, taken = np.random.default_rng(0), 0
    small = {"ssl.name": "dinov2", "ssl.hidden_dim": 8, "ssl.bottleneck_dim": 4, "ssl.prototypes": 8}
    small |= {"encoder.name": "tiny", "encoder.depth": 1, "cells": "c", "output": "o"}
    while taken < 60:
        values: dict[str, Any] = {"views": load_policy("a1_gray").model_dump()}
        drawn = {key: choices[random.integers(len(choices))] for key, choices in CHOICES.items()}
        for key, value in (small | drawn).items():
            *above, name = key.split(".")
            place = values
            for part in above:
                place = place.setdefault(part, {})
            place[name] = value
        try:
            config = validate(values, PretrainConfig)
        except ConfigError:
            continue
        taken += 1
        assert isinstance(config.ssl, DINOv2Config)
        method = DINOv2(config.ssl, config.encoder, seed=0)
        run = method.schedules(epochs=config.epochs, steps_per_epoch=config.steps_per_epoch, batch=config.batch)
        feed = Feed(
            ImagesInMemory(synthetic_crops(20)),
            Permutation(20, seed=0),
            batch=config.batch,
            device=torch.device("cpu"),
        )
        checkpoints = Checkpoints(Store(tmp_path))
        trainer = Trainer(method, feed, config.views, run, seed=0, checkpoints=checkpoints, config={})
        for images in feed.batches(0, min(2, config.total_steps)):
            assert np.isfinite(float(trainer.train_step(images)["loss"])), drawn
