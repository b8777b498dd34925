"""A transformer's MLP by the Triton kernel: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from lemon.encoders.mlp import MIN_ROWS, CellMlp, gelu_mlp, serves
from tests.encoders.interpreter import interpreted

pytest.importorskip("triton")


def errors(x: Tensor, first: nn.Linear, second: nn.Linear) -> dict[str, float]:
    """Largest error of output and gradients against the formula in float64, over the largest value."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
    exact = [copy.deepcopy(layer).double() for layer in (first, second)]
    wide, given = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, got = exact[1](F.gelu(exact[0](wide))), gelu_mlp(given, first, second)
    expected.backward(grad.double())
    got.backward(grad)
    assert got.dtype == x.dtype
    pairs = {"output": (got, expected), "input": (given.grad, wide.grad)}
    for number, (ours, theirs) in enumerate(zip((first, second), exact, strict=True)):
        pairs[f"weight {number}"] = (ours.weight.grad, theirs.weight.grad)
        pairs[f"bias {number}"] = (ours.bias.grad, theirs.bias.grad)
    with torch.no_grad():
        assert torch.equal(gelu_mlp(x, first, second), got)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


def case(rows: tuple[int, ...], dim: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    torch.manual_seed(0)
    first, second = (nn.Linear(*sizes).to(device, dtype) for sizes in ((dim, 4 * dim), (4 * dim, dim)))
    return errors(torch.randn(*rows, dim).to(device, dtype), first, second)


CASES = [((3, 27), 64), ((130,), 64), ((1, 1), 128)]
"""Rows that fill no tile, more than one tile of them, and one row."""


@pytest.mark.slow
def test_the_kernel_equals_the_formula_in_the_interpreter() -> None:
    *exact, half = interpreted(
        "[case(*c, torch.float32) for c in CASES] + [case(*CASES[0], torch.float16)]",
        imports="from tests.encoders.test_mlp import CASES, case",
    )
    assert len(exact) == len(CASES)
    assert max(max(found.values()) for found in exact) < 2e-6, exact
    assert max(half.values()) < 4e-3, half


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [192, 384, 768])
def test_the_kernel_equals_the_formula_on_a_gpu(dim: int) -> None:
    assert max(case((700, 26), dim, torch.bfloat16, "cuda").values()) < 3e-2


def test_without_a_gpu_the_mlp_is_timms_bit_by_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = CellMlp(64, 256), Mlp(64, 256)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(MIN_ROWS, 64)
    assert not serves(x, ours.fc1)
    assert torch.equal(ours(x), theirs(x))
