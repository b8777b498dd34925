"""Attention over a few tokens: one Triton kernel forward, one backward, straight on what the qkv layer returns.

A cell is 26 tokens (5x5 patches and the class token). Library kernels work on tiles of 64 to 128 tokens and on q, k and
v apart, so most of their work is padding. Here one program holds all tokens of a cell and a head in registers, reads
each number once and writes each number once; scores are computed again in the backward instead of being kept.

``serves`` says where the kernel is used; everywhere else timm's attention (scaled_dot_product_attention) stays.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor
from torch.library import triton_op, wrap_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # no build of Triton for this platform, as on macOS
    triton = None

MAX_TOKENS = 64
"""With more, library kernels have little padding, and scores no longer fit a warp's registers."""
MAX_HEAD_DIM = 128


def attend(qkv: Tensor, *, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of every head, with gradient: the kernel, wherever it can run.

    Args:
        qkv: [B, N, 3 * heads * D], as the linear layer returns it: q of all heads, k of all heads, v of all heads.
        heads: number of heads.

    Returns:
        [B, N, heads * D], of the type of ``qkv``. Sums are float32.
    """
    return _attend(qkv.contiguous(), heads)


def serves(x: Tensor, *, tokens: int, head_dim: int) -> bool:
    """Whether the kernel computes attention for ``x``: on a GPU that Triton knows, and for few tokens."""
    return x.is_cuda and tokens <= MAX_TOKENS and head_dim <= MAX_HEAD_DIM and triton_runs()


@torch.compiler.assume_constant_result
def triton_runs() -> bool:
    """Whether this GPU is one that Triton's kernels are written for."""
    # The first generation with bfloat16, which Triton's support begins with.
    return triton is not None and torch.cuda.get_device_capability() >= (8, 0)


class CellAttention(Attention):
    """timm's attention, with the same parameters, that computes short sequences by the kernel."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, dim] -> [B, N, dim]; a mask goes to timm's own."""
        if args or any(value is not None and value is not False for value in kwargs.values()) or not self._short(x):
            return super().forward(x, *args, **kwargs)
        return self.proj(attend(self.qkv(x), heads=self.num_heads))

    def first_row(self, x: Tensor) -> Tensor:
        """The first row of the output, [B, N, dim] -> [B, 1, dim]."""
        if not self._short(x):
            return self(x)[:, :1]
        return self.proj(attend(self.qkv(x), heads=self.num_heads)[:, :1])

    def _short(self, x: Tensor) -> bool:
        return serves(x, tokens=x.shape[1], head_dim=self.qkv.out_features // (3 * self.num_heads))


if triton is not None:

    @triton.jit
    def _tile(base, rows, columns, stride, TOKENS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
        """Pointers of one head's matrix [tokens, dim], padded to a tile, and which of them exist."""
        return base + rows[:, None] * stride + columns[None, :], (rows[:, None] < TOKENS) & (columns[None, :] < DIM)

    @triton.jit
    def _dot(a, b, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
        """float32, without TF32 where float32 is asked for."""
        return tl.dot(a, b, input_precision="ieee" if EXACT else "tf32")

    @triton.jit
    def _softmax(q, k, rows, SCALE: tl.constexpr, TOKENS: tl.constexpr, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
        """float32 [rows, rows], of base 2: ``SCALE`` holds log2(e). Keys beyond the tokens get 0."""
        scores = _dot(q, tl.trans(k), EXACT) * SCALE
        scores = tl.where(rows[None, :] < TOKENS, scores, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        return weights / tl.sum(weights, axis=1)[:, None]

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        qkv_pointer,
        out_pointer,
        SCALE: tl.constexpr,
        TOKENS: tl.constexpr,
        HEADS: tl.constexpr,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        EXACT: tl.constexpr,
    ):
        cell = (tl.program_id(0) // (HEADS // GROUP)).to(tl.int64)
        first = (tl.program_id(0) % (HEADS // GROUP)) * GROUP
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        width = HEADS * DIM
        for i in range(GROUP):
            base = qkv_pointer + cell * (TOKENS * 3 * width) + (first + i) * DIM
            at, in_bounds = _tile(base, rows, columns, 3 * width, TOKENS, DIM)
            q = tl.load(at, mask=in_bounds, other=0.0)
            k = tl.load(at + width, mask=in_bounds, other=0.0)
            v = tl.load(at + 2 * width, mask=in_bounds, other=0.0)
            p = _softmax(q, k, rows, SCALE * 1.4426950408889634, TOKENS, EXACT)
            out = _dot(p.to(v.dtype), v, EXACT)
            base = out_pointer + cell * (TOKENS * width) + (first + i) * DIM
            at, in_bounds = _tile(base, rows, columns, width, TOKENS, DIM)
            tl.store(at, out.to(v.dtype), mask=in_bounds)

    @triton.jit
    def _backward_kernel(  # type: ignore[no-untyped-def]
        qkv_pointer,
        grad_pointer,
        grad_qkv_pointer,
        SCALE: tl.constexpr,
        TOKENS: tl.constexpr,
        HEADS: tl.constexpr,
        DIM: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
        GROUP: tl.constexpr,
        EXACT: tl.constexpr,
    ):
        cell = (tl.program_id(0) // (HEADS // GROUP)).to(tl.int64)
        first = (tl.program_id(0) % (HEADS // GROUP)) * GROUP
        rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        width = HEADS * DIM
        for i in range(GROUP):
            offset = cell * (TOKENS * 3 * width) + (first + i) * DIM
            at, in_bounds = _tile(qkv_pointer + offset, rows, columns, 3 * width, TOKENS, DIM)
            q = tl.load(at, mask=in_bounds, other=0.0)
            k = tl.load(at + width, mask=in_bounds, other=0.0)
            v = tl.load(at + 2 * width, mask=in_bounds, other=0.0)
            base = grad_pointer + cell * (TOKENS * width) + (first + i) * DIM
            at, in_bounds = _tile(base, rows, columns, width, TOKENS, DIM)
            g = tl.load(at, mask=in_bounds, other=0.0)  # zero rows beyond the tokens, so that they add nothing below
            p = _softmax(q, k, rows, SCALE * 1.4426950408889634, TOKENS, EXACT)
            grad_p = _dot(g, tl.trans(v), EXACT)
            grad_s = p * (grad_p - tl.sum(p * grad_p, axis=1)[:, None]) * SCALE
            grad_s = grad_s.to(q.dtype)
            at, in_bounds = _tile(grad_qkv_pointer + offset, rows, columns, 3 * width, TOKENS, DIM)
            grad_q = _dot(grad_s, k, EXACT)
            tl.store(at, grad_q.to(q.dtype), mask=in_bounds)
            grad_k = _dot(tl.trans(grad_s), q, EXACT)
            tl.store(at + width, grad_k.to(q.dtype), mask=in_bounds)
            grad_v = _dot(tl.trans(p.to(q.dtype)), g, EXACT)
            tl.store(at + 2 * width, grad_v.to(q.dtype), mask=in_bounds)


def _launch(kernel: Any, qkv: Tensor, *operands: Tensor, heads: int) -> None:
    cells, tokens, dim = qkv.shape[0], qkv.shape[1], qkv.shape[2] // (3 * heads)
    rows, columns = (max(16, 1 << (n - 1).bit_length()) for n in (tokens, dim))  # a matrix instruction takes 16
    group, warps = launch_shape(rows=rows, columns=columns)
    # Triton's interpreter is no JITFunction, and runs on tensors of a CPU.
    runs = wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel
    runs[(cells * heads // group,)](
        qkv,
        *operands,
        SCALE=dim**-0.5,  # as an argument, torch 2.11 compiles it as float64, which doubles the time
        TOKENS=tokens,
        HEADS=heads,
        DIM=dim,
        ROWS=rows,
        COLUMNS=columns,
        GROUP=group,
        EXACT=int(qkv.dtype == torch.float32),
        num_warps=warps,
    )


def launch_shape(*, rows: int, columns: int) -> tuple[int, int]:
    """(heads that a program takes one after another, warps of a program)."""
    return 1, max(1, min(8, rows * max(rows, columns) // 1024))


@triton_op("lemon::attend_short", mutates_args={})
def _attend(qkv: Tensor, heads: int) -> Tensor:
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    _launch(_forward_kernel, qkv, out, heads=heads)
    return out


@triton_op("lemon::attend_short_backward", mutates_args={})
def _attend_backward(qkv: Tensor, grad: Tensor, heads: int) -> Tensor:
    grad_qkv = torch.empty_like(qkv)
    _launch(_backward_kernel, qkv, grad, grad_qkv, heads=heads)
    return grad_qkv


def _setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])
    ctx.heads = inputs[1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (qkv,) = ctx.saved_tensors
    return _attend_backward(qkv, grad.contiguous(), ctx.heads), None


_attend.register_autograd(_differentiate, setup_context=_setup)
