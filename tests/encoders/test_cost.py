"""Arithmetic is counted as formulas by hand say, in both conventions, for every encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lemon.encoders.architectures import build
from lemon.encoders.cost import cells_per_s, count, encoder_cost
from lemon.encoders.open import load_encoder
from lemon.encoders.registry import encoder_names, find_entry


def layer_macs(model: nn.Module, *, px: int) -> int:
    """Multiply-adds of the layers alone, from the shapes that pass through them: another way to the paper's number."""
    total = 0

    def add(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += layer.weight.numel() * output.shape[-2] * output.shape[-1]
        else:
            total += output.numel() * layer.in_features

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        model(torch.zeros(1, 3, px, px, device=next(model.parameters()).device))
    for hook in hooks:
        hook.remove()
    return total


def vit_flop(*, tokens: int, dim: int, depth: int, patch_values: int) -> tuple[int, int]:
    """All arithmetic, and the paper's, of a plain transformer: 12 dim^2 a token and block, the patches, attention."""
    layers = depth * tokens * 12 * dim * dim + (tokens - 1) * dim * patch_values
    attention = depth * 2 * tokens * tokens * dim
    return 2 * (layers + attention), layers


def test_vit_s8_costs_what_the_paper_and_the_formula_say() -> None:
    cost = encoder_cost("lemon")
    assert (cost.flop, cost.paper_mac) == vit_flop(tokens=26, dim=384, depth=12, patch_values=192)
    assert cost.paper_mac / 1e9 == pytest.approx(0.55, abs=0.005)
    assert cost.flop / 1e9 == pytest.approx(1.12, abs=0.005)
    assert cost.parameters == 21_378_816


@pytest.mark.slow
def test_h_optimus_0_costs_what_the_paper_says() -> None:
    assert encoder_cost("h-optimus-0").paper_mac / 1e9 == pytest.approx(295.8, abs=0.05)


@pytest.mark.slow
def test_a_transformer_of_transformers_is_counted_alike() -> None:
    pytest.importorskip("transformers")
    cost = encoder_cost("phikon-v2")
    assert (cost.flop, cost.paper_mac) == vit_flop(tokens=197, dim=1024, depth=24, patch_values=768)
    assert cost.paper_mac == encoder_cost("uni").paper_mac


@pytest.mark.slow
@pytest.mark.parametrize("name", encoder_names())
def test_the_papers_number_is_the_sum_over_the_layers(name: str) -> None:
    if find_entry(name).source == "transformers":
        pytest.importorskip("transformers")
    model = build(find_entry(name), device="meta")
    px = find_entry(name).input_px
    cost = count(model, px=px)
    assert cost.paper_mac == layer_macs(model, px=px)
    assert cost.flop >= 2 * cost.paper_mac


def test_a_real_device_counts_what_meta_counts() -> None:
    assert count(build(find_entry("untrained_vit_tiny8")), px=40) == encoder_cost("untrained_vit_tiny8")


def test_cells_a_second_are_measured() -> None:
    encoder = load_encoder("untrained_vit_tiny8")
    assert cells_per_s(encoder, cells=8, batch=4, repeats=1) > 1
