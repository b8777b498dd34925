"""Schedules against the reference's values, and their corners."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lemon.pretrain.schedules import Curve, Schedules, param_group, set_optimizer
from tests.conftest import shared


def example(**changes: object) -> Schedules:
    schedules = Schedules(
        epochs=10,
        steps_per_epoch=4,
        lr=Curve(1.0, 0.0, 10, warmup_epochs=2),
        weight_decay=Curve(0.04, 0.4, 10),
        momentum=Curve(0.99, 1.0, 10),
        teacher_temperature=Curve(0.04, 0.07, 3, shape="linear"),
        freeze_last_layer_epochs=1,
    )
    return replace(schedules, **changes)


def test_learning_rate_and_momentum_of_moco_are_those_of_the_reference() -> None:
    with np.load(shared("golden/ssl_losses.npz")) as golden:
        epochs, lr, momentum = (golden[f"schedule_{key}"] for key in ("epoch", "lr", "momentum"))
    curve = Curve(1.5e-4 * 4096 / 256, 0.0, 150, warmup_epochs=40)
    np.testing.assert_allclose([curve(epoch) for epoch in epochs], lr, rtol=1e-9, atol=1e-15)
    curve = Curve(0.99, 1.0, 150)
    np.testing.assert_allclose([curve(epoch) for epoch in epochs], momentum, rtol=1e-12)


def test_a_warmup_ends_at_the_base_value_without_a_jump() -> None:
    curve = Curve(2.0, 0.5, 10, warmup_epochs=4)
    assert curve(0) == 0
    assert curve(2) == 1
    assert curve(4) == 2
    assert curve(4 - 1e-9) == pytest.approx(2)
    assert curve(10) == curve(11) == 0.5


def test_a_linear_ramp_stays_at_its_end() -> None:
    curve = Curve(0.04, 0.07, 30, shape="linear")
    assert curve(15) == pytest.approx(0.055)
    assert curve(30) == curve(149) == 0.07
    assert Curve(0.04, 0.07, 0, shape="linear")(0) == 0.07


def test_values_of_a_step_depend_on_its_fractional_epoch() -> None:
    values = example().at(6)
    assert values.epoch == 1.5
    assert values.lr == values.last_layer_lr == 0.75
    assert values.teacher_temperature == pytest.approx(0.055)
    assert example().steps == 40
    assert example(epochs=0.5, lr=Curve(1, 0, 0.5), freeze_last_layer_epochs=0).steps == 2


def test_the_last_layer_rests_in_the_first_epoch() -> None:
    schedules = example()
    assert schedules.at(3).last_layer_lr == 0
    assert schedules.at(3).lr > 0
    assert schedules.at(4).last_layer_lr == schedules.at(4).lr > 0


def test_groups_get_their_share_of_learning_rate_and_weight_decay() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    groups = [
        param_group(parameters[:1]),
        param_group(parameters[1:2], lr_scale=0.5, wd_scale=0.0),
        param_group(parameters[2:], last_layer=True),
    ]
    optimizer = torch.optim.AdamW(groups)
    values = example().at(2)
    set_optimizer(optimizer, values)
    assert [group["lr"] for group in optimizer.param_groups] == [values.lr, 0.5 * values.lr, 0.0]
    decay = values.weight_decay
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0, decay]
