"""Rates and sizes that are told before anything is built, held against what was counted and what is built."""

from __future__ import annotations

import io

import pytest
import torch

from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.rates import checkpoint_bytes, image_flop, rates_of
from lemon.runtime.config import load


def config_of(*words: str) -> PretrainConfig:
    return load("pretrain", ["cells=c", "output=o", *words], PretrainConfig)


@pytest.mark.parametrize(("encoder", "gflop"), [("vit_s8", 9.3), ("vit_tiny8", 1.4625)])
def test_arithmetic_of_an_image_is_that_which_was_counted(encoder: str, gflop: float) -> None:
    config = config_of(f"encoder={encoder}")
    assert image_flop(config.encoder, config.ssl) == pytest.approx(gflop * 1e9, rel=0.01)  # benchmarks/results/pretrain


@pytest.mark.parametrize(
    "words",
    [
        ["variant=smoke"],
        ["variant=smoke", "ssl=dinov2_tiny"],
        ["variant=smoke", "ssl=dinov2_tiny", "ssl.separate_ibot_head=true", "encoder.patch_px=4"],
    ],
    ids=["mocov3", "dinov2", "two heads"],
)
def test_the_size_of_a_checkpoint_is_nearly_that_of_what_it_holds(words: list[str]) -> None:
    config = config_of(*words)
    method = config.ssl.build(config.encoder, seed=0)
    trained = [weights for group in method.param_groups() for weights in group["params"]]
    moments = [torch.zeros_like(weights) for weights in trained for _ in range(2)]
    stream = io.BytesIO()
    torch.save({"method": method.state_dict(), "optimizer": moments}, stream)
    assert checkpoint_bytes(config) == pytest.approx(stream.tell(), rel=0.05)


def test_what_was_measured_is_taken_as_it_is_and_what_was_not_is_arithmetic() -> None:
    (h100,) = rates_of(config_of("ssl=dinov2_kde"))
    assert (h100.device, h100.images_per_s) == ("NVIDIA H100 80GB HBM3, bf16", 14_253)
    assert not h100.basis.startswith("arithmetic")
    large, small = (next(rates_of(config_of(f"encoder={name}"))) for name in ("vit_b8", "vit_s8"))
    assert 3 < small.images_per_s / large.images_per_s < 4.5
    assert large.basis.startswith("arithmetic, 3.9 times the work of vit_s8, mocov3, batch 4096")
    mini = list(rates_of(config_of("encoder=vit_mini8", "ssl.warmup_epochs=1")))
    assert [rate.images_per_s for rate in mini] == [34_000, 56], "a smaller encoder is promised no more"


def test_the_hours_are_those_of_one_device() -> None:
    assert next(rates_of(config_of())).hours(34_496 * 7200) == 2
