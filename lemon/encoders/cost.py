"""What an encoder costs: parameters, arithmetic by two conventions, and cells a second.

``flop`` is all arithmetic of matrix products and convolutions of one cell, a multiply-add being two, as torch counts
it. ``paper_mac`` is the convention of the LEMON paper's "FLOPs": multiply-adds of the layers only, a multiply-add being
one, without the two products inside attention (queries by keys, weights by values).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lemon.encoders.architectures import build
from lemon.encoders.features import default_batch
from lemon.encoders.open import Encoder
from lemon.encoders.registry import find_entry
from lemon.schema import CELL_PX

aten = torch.ops.aten
ATTENTION_PRODUCTS: tuple[Any, ...] = (aten.bmm, aten.baddbmm)
"""What attention becomes once it is not fused; layers become mm, addmm and convolution."""


@dataclass(frozen=True)
class Cost:
    """Of one cell: ``flop`` with a multiply-add as two, ``paper_mac`` without attention's products (see above)."""

    parameters: int
    flop: int
    paper_mac: int


def encoder_cost(name: str) -> Cost:
    """The cost of an encoder of the registry, counted without memory or weights (on the ``meta`` device)."""
    entry = find_entry(name)
    return count(build(entry, device="meta"), px=entry.input_px)


@torch.no_grad()
def count(model: nn.Module, *, px: int) -> Cost:
    """The cost of a network that maps [B, 3, px, px] to features, on whatever device it is."""
    device = next(model.parameters()).device
    # Fused attention is one operator, a different one on each device, and torch knows the arithmetic of some only;
    # unfused, it is two matrix products that are counted everywhere.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, px, px, device=device))
    by_operator = counter.get_flop_counts()["Global"]
    attention = sum(by_operator.get(operator, 0) for operator in ATTENTION_PRODUCTS)
    total = sum(by_operator.values())
    return Cost(
        parameters=sum(weights.numel() for weights in model.parameters()),
        flop=total,
        paper_mac=(total - attention) // 2,
    )


def cells_per_s(
    encoder: Encoder,
    *,
    device: str | torch.device = "cpu",
    cells: int = 256,
    batch: int | None = None,
    bf16: bool = False,
    repeats: int = 3,
) -> float:
    """Cells a second of ``Encoder.embed``, from bytes in host memory to features: the best of ``repeats`` passes.

    Args:
        encoder: moved to the device.
        device: where it computes.
        cells: random cells of a pass.
        batch: cells at a time; None: the encoder's default.
        bf16: compute in bfloat16.
        repeats: passes, after one batch to warm up.
    """
    encoder = encoder.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (cells, CELL_PX, CELL_PX, 3), dtype=torch.uint8, generator=generator)
    encoder.embed(images[: batch or default_batch(encoder.cell_input.px)], batch=batch, bf16=bf16)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait_for(encoder.embed(images, batch=batch, bf16=bf16))
        seconds.append(time.perf_counter() - start)
    return cells / min(seconds)


def wait_for(features: Tensor) -> None:
    """Return once the device has computed the features: a value is read."""
    features[-1, -1].item()
