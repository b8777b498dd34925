"""A transformer's MLP whose GELU, forward and backward, is computed inside the matrix products, by a Triton kernel.

The hidden layer is four times as wide as the residual stream, and with 384 to 768 channels its matrix products take
no longer than reading and writing it. Apart, GELU reads and writes it twice more. ``serves`` says where the kernel is
used; everywhere else timm's Mlp stays.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.library import triton_op, wrap_triton

from lemon.encoders.attention import triton_runs

try:
    import triton
    import triton.language as tl
except ImportError:  # no build of Triton for this platform, as on macOS
    triton = None

MIN_ROWS = 8192
"""Fewer rows do not fill a GPU with tiles."""
FORWARD = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_DEPTH": 64, "num_warps": 8, "num_stages": 3}
BACKWARD = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128, "BLOCK_DEPTH": 64, "num_warps": 4, "num_stages": 3}
"""The fastest of five on an H100: several fit a multiprocessor, and one is multiplied while another is written."""


def gelu_mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """``second(gelu(first(x)))`` with gradient, [..., C] -> [..., C], by the kernel; of autocast's type if it is on."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    weights = (first.weight, first.bias, second.weight, second.bias)
    cast_weights = (weight.to(dtype) for weight in weights)
    keep = torch.is_grad_enabled()  # what the backward needs
    with torch.autocast(x.device.type, enabled=False):
        out, _, _ = _gelu_mlp(x.to(dtype).reshape(-1, x.shape[-1]), *cast_weights, keep)
    return out.view(*x.shape[:-1], out.shape[-1])


def serves(x: Tensor, first: nn.Linear) -> bool:
    """Whether the kernel computes the MLP for ``x``: 16 bits on a GPU that Triton knows, whole tiles, enough rows."""
    if not x.is_cuda or x.numel() < MIN_ROWS * x.shape[-1] or not triton_runs():
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    is_aligned = first.in_features % 64 == 0 and first.out_features % 256 == 0
    return is_aligned and dtype in (torch.bfloat16, torch.float16)


class CellMlp(Mlp):
    """timm's MLP, with the same parameters, that computes many rows by the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        first, second = cast(nn.Linear, self.fc1), cast(nn.Linear, self.fc2)
        exact = type(self.act) is nn.GELU and self.act.approximate == "none"
        plain = exact and isinstance(self.norm, nn.Identity) and not (self.training and self.drop1.p + self.drop2.p)
        if not plain or not serves(x, first):
            return super().forward(x)
        return gelu_mlp(x, first, second)


if triton is not None:

    @triton.jit
    def _normal(x):  # type: ignore[no-untyped-def]
        """(Phi(x), exp(-x^2 / 2)) of the normal distribution, to 1e-7 (Abramowitz and Stegun 7.1.26)."""
        bell = tl.exp2(x * x * -0.7213475204444817)
        t = 1.0 / (1.0 + 0.2316418882663604 * tl.abs(x))
        tail = 0.530702714 * t - 0.7265760135
        tail = (tail * t + 0.7107068705) * t - 0.142248368
        tail = (tail * t + 0.127414796) * t * bell
        return tl.where(x < 0, tail, 1.0 - tail), bell

    @triton.jit
    def _product_kernel(  # type: ignore[no-untyped-def]
        rows_pointer,  # [ROWS, DEPTH]
        weight_pointer,  # forward: [COLUMNS, DEPTH]; backward: [DEPTH, COLUMNS]
        bias_pointer,  # forward: [COLUMNS]
        hidden_pointer,  # [ROWS, COLUMNS], before GELU; forward: written if KEEP; backward: read
        out_pointer,  # [ROWS, COLUMNS], forward: after GELU; backward: gradient of ``hidden``
        sums_pointer,  # backward: float32 [tiles of rows, COLUMNS], column sums of the gradient
        n_rows,
        COLUMNS: tl.constexpr,
        DEPTH: tl.constexpr,
        BACKWARD: tl.constexpr,
        KEEP: tl.constexpr,
        EXACT: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_COLUMNS: tl.constexpr,
        BLOCK_DEPTH: tl.constexpr,
    ):
        across: tl.constexpr = COLUMNS // BLOCK_COLUMNS
        tile = tl.program_id(0) // across  # neighbours share rows
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        columns = (tl.program_id(0) % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        depth = tl.arange(0, BLOCK_DEPTH)
        in_bounds = (rows < n_rows)[:, None]
        rows_at = rows_pointer + rows.to(tl.int64)[:, None] * DEPTH + depth[None, :]
        if BACKWARD:
            weight_at = weight_pointer + depth[:, None] * COLUMNS + columns[None, :]
        else:
            weight_at = weight_pointer + depth[:, None] + columns[None, :] * DEPTH
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, DEPTH, BLOCK_DEPTH):
            a = tl.load(rows_at + start, mask=in_bounds, other=0.0)
            b = tl.load(weight_at + start * (COLUMNS if BACKWARD else 1))
            total = tl.dot(a, b, total, input_precision="ieee" if EXACT else "tf32")
        at = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        kind = out_pointer.dtype.element_ty
        if BACKWARD:
            hidden = tl.load(hidden_pointer + at, mask=in_bounds, other=0.0).to(tl.float32)
            below, bell = _normal(hidden)
            out = (total * (below + hidden * bell * 0.3989422804014327)).to(kind)
            tl.store(out_pointer + at, out, mask=in_bounds)
            tl.store(sums_pointer + tile * COLUMNS + columns, tl.sum(out.to(tl.float32), axis=0))
        else:
            hidden = (total + tl.load(bias_pointer + columns).to(tl.float32)[None, :]).to(kind)
            if KEEP:
                tl.store(hidden_pointer + at, hidden, mask=in_bounds)
            wide = hidden.to(tl.float32)
            below, _ = _normal(wide)
            tl.store(out_pointer + at, (wide * below).to(kind), mask=in_bounds)


def _launch(rows: Tensor, *operands: Tensor, columns: int, backward: bool = False, keep: bool = False) -> None:
    n, depth = rows.shape
    shape = BACKWARD if backward else FORWARD
    runs = wrap_triton(_product_kernel) if isinstance(_product_kernel, triton.JITFunction) else _product_kernel
    runs[(triton.cdiv(n, shape["BLOCK_ROWS"]) * (columns // shape["BLOCK_COLUMNS"]),)](
        rows,
        *operands,
        n,
        COLUMNS=columns,
        DEPTH=depth,
        BACKWARD=int(backward),
        KEEP=int(keep),
        EXACT=int(rows.dtype == torch.float32),
        **shape,
    )


@triton_op("lemon::gelu_linear", mutates_args={})
def _gelu_linear(x: Tensor, weight: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """x [n, C], weight [H, C], bias [H] -> gelu(linear) [n, H], and linear [n, H] if ``keep`` (else [0, H])."""
    out = x.new_empty(len(x), len(weight))
    hidden = x.new_empty(len(x) if keep else 0, len(weight))
    _launch(x, weight, bias, hidden, out, bias, columns=len(weight), keep=keep)
    return out, hidden


@triton_op("lemon::gelu_linear_backward", mutates_args={})
def _gelu_linear_backward(grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """grad [n, C] of the second layer's output, its weight [C, H], hidden [n, H] -> gradients of hidden and bias."""
    out = torch.empty_like(hidden)
    sums = grad.new_empty(triton.cdiv(len(grad), BACKWARD["BLOCK_ROWS"]), weight.shape[1], dtype=torch.float32)
    _launch(grad, weight, hidden, hidden, out, sums, columns=weight.shape[1], backward=True)
    return out, sums.sum(dim=0)


@triton_op("lemon::gelu_mlp", mutates_args={})
def _gelu_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    active, hidden = _gelu_linear(x.contiguous(), weight1.contiguous(), bias1.contiguous(), keep)
    return F.linear(active, weight2, bias2), active, hidden


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, bool], output: tuple[Tensor, ...]) -> None:
    x, weight1, _, weight2, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight1, weight2, *output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight1, weight2, active, hidden = ctx.saved_tensors
    grad_hidden, grad_bias1 = _gelu_linear_backward(grad.contiguous(), weight2.contiguous(), hidden)
    grad_x = grad_hidden @ weight1
    grad_weight1, grad_weight2 = grad_hidden.T @ x, grad.T @ active
    return grad_x, grad_weight1, grad_bias1.to(x.dtype), grad_weight2, grad.sum(dim=0), None


_gelu_mlp.register_autograd(_differentiate, setup_context=_setup)
