"""Attention over a few tokens by the Triton kernel: in Triton's interpreter on a CPU, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lemon.encoders.attention import MAX_TOKENS, CellAttention, attend, serves
from tests.encoders.interpreter import interpreted

pytest.importorskip("triton")

SHAPES = [
    (3, 26, 12, 32),
    (2, 26, 12, 64),
    (2, 10, 6, 64),
    (1, 5, 3, 16),
    (2, 1, 2, 32),
    (2, 17, 3, 24),
    (1, 64, 2, 32),
]
"""(cells, tokens, heads, width of a head): LEMON's ViT-S/8 and B/8, DINOv2's local crops, and odd sizes."""


def formula(qkv: Tensor, *, heads: int) -> Tensor:
    """Attention as it is written, in the type of its input."""
    cells, tokens, width = qkv.shape
    q, k, v = qkv.view(cells, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(cells, tokens, -1)


def errors(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Largest error of output and gradient against the formula in float64, over the largest value."""
    cells, tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(tokens)
    qkv = 2 * torch.randn(cells, tokens, 3 * heads * dim, generator=generator)
    grad = torch.randn(cells, tokens, heads * dim, generator=generator)
    given, wanted = (t.to(dtype).to(device) for t in (qkv, grad))
    exact, given = given.double().requires_grad_(), given.requires_grad_()
    expected, got = formula(exact, heads=heads), attend(given, heads=heads)
    expected.backward(wanted.double())
    got.backward(wanted)
    assert got.dtype == given.grad.dtype == dtype
    pairs = {"output": (got.detach(), expected.detach()), "gradient": (given.grad, exact.grad)}
    return {name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for name, (a, b) in pairs.items()}


BOUNDS = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
INTERPRETED = {dtype: bound for dtype, bound in BOUNDS.items() if dtype != torch.bfloat16}
"""The interpreter computes with NumPy, which takes bfloat16 for integers."""


@pytest.mark.slow
def test_the_kernel_equals_the_formula_in_the_interpreter() -> None:
    rows = interpreted(
        "[[s, str(d), b, errors(s, d, 'cpu')] for s in SHAPES for d, b in INTERPRETED.items()]",
        imports="from tests.encoders.test_attention import INTERPRETED, SHAPES, errors",
    )
    assert len(rows) == len(SHAPES) * len(INTERPRETED)
    for shape, dtype, bound, found in rows:
        assert max(found.values()) < bound, (shape, dtype, found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("shape", "dtype"), [(SHAPES[0], dtype) for dtype in BOUNDS] + [(shape, torch.bfloat16) for shape in SHAPES[1:]]
)
def test_the_kernel_equals_the_formula_on_a_gpu(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    assert max(errors(shape, dtype, "cuda").values()) < BOUNDS[dtype]


@pytest.mark.parametrize("tokens", [5, 26, 65, 200])
@pytest.mark.parametrize("options", [{}, {"attn_mask": True}])
def test_without_a_gpu_or_with_a_mask_attention_is_timms_bit_by_bit(tokens: int, options: dict[str, Any]) -> None:
    from timm.layers import Attention

    torch.manual_seed(0)
    ours = CellAttention(48, num_heads=3, qkv_bias=True)
    theirs = Attention(48, num_heads=3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, tokens, 48)
    given = {"attn_mask": torch.ones(tokens, tokens, dtype=torch.bool).tril()} if options else {}
    assert torch.equal(ours(x, **given), theirs(x, **given))


def test_the_kernel_serves_short_sequences_on_a_gpu_only() -> None:
    x = torch.empty(1)
    assert not serves(x, tokens=26, head_dim=32)
    if torch.cuda.is_available():
        assert serves(x.cuda(), tokens=26, head_dim=32)
        assert not serves(x.cuda(), tokens=MAX_TOKENS + 1, head_dim=32)
