"""Attention over the tokens of a cell: the Triton kernel, torch's fused attention, and cells packed for FlexAttention.

python -m benchmarks.attention [--cells 8192 --heads 12 --width 32 --tokens 26 --dtype bfloat16] [--sweep]

Each side goes from what the qkv layer returns, [cells, tokens, 3 * heads * width], to what the projection takes, and
back to the gradient of the former: so copies that a side needs count for it. Packed: 64 cells make one sequence, and a
block mask keeps each to itself. The bound is the time that the bytes of input and output take at ``--peak-tb-s``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.record import record
from lemon.encoders import attention

PACKED = 64


def main() -> None:
    """Measure, print and record each side as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"cells": 8192, "tokens": 26, "heads": 12, "width": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--peak-tb-s", type=float, default=3.35, help="of the device's memory")
    parser.add_argument("--sweep", action="store_true", help="the kernel at other launch shapes too")
    options = parser.parse_args()
    shape = (options.cells, options.tokens, 3 * options.heads * options.width)
    qkv = torch.randn(shape, device="cuda", dtype=getattr(torch, options.dtype))
    for name, attend in sides(options).items():
        figures = {"side": name, **times(attend, qkv), **bounds(qkv, options.peak_tb_s)}
        print(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in figures.items()}, flush=True
        )
        record("attention", {**vars(options), "gpu": torch.cuda.get_device_name(), **figures}, packages=("torch",))


def sides(options: argparse.Namespace) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared, by name."""
    shapes = list(itertools.product((1, 2, 4), (1, 2, 3, 6))) if options.sweep else []
    kernels = {f"kernel, {warps} warps, {group} heads": _kernel(options.heads, warps, group) for warps, group in shapes}
    fused = torch.compile(lambda qkv: _fused(qkv, options.heads))
    return {"kernel": _kernel(options.heads), "fused": fused, **kernels, "packed": _packed(options)}


def _kernel(heads: int, *shape: int) -> Callable[[Tensor], Tensor]:
    chosen = attention.launch_shape

    def attend(qkv: Tensor) -> Tensor:
        attention.launch_shape = (lambda **_: (shape[1], shape[0])) if shape else chosen
        return attention.attend(qkv, heads=heads)

    return attend


def _split(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    cells, tokens, width = qkv.shape
    q, k, v = qkv.view(cells, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _fused(qkv: Tensor, heads: int) -> Tensor:
    out = F.scaled_dot_product_attention(*_split(qkv, heads))
    return out.transpose(1, 2).reshape(*qkv.shape[:2], -1)


def _packed(options: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    length, tokens = PACKED * options.tokens, options.tokens

    def same_cell(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query // tokens == key // tokens

    mask: Any = create_block_mask(same_cell, None, None, length, length, device="cuda")

    def attend(qkv: Tensor) -> Tensor:
        packed = qkv.view(-1, length, qkv.shape[2])
        out: Any = flex_attention(*_split(packed, options.heads), block_mask=mask)
        return out.transpose(1, 2).reshape(*qkv.shape[:2], -1)

    return torch.compile(attend, dynamic=False)


def times(attend: Callable[[Tensor], Tensor], qkv: Tensor) -> dict[str, float]:
    """Milliseconds of the forward and of the backward on the device: medians of 20."""
    leaf = qkv.detach().requires_grad_()
    grad = torch.randn_like(attend(leaf))
    stamps = []
    torch.cuda._sleep(200_000_000)  # a tenth of a second, in which the host gets ahead, so that gaps do not count
    for _ in range(25):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        out = attend(leaf)
        marks[1].record()
        torch.autograd.grad(out, leaf, grad)
        marks[2].record()
        stamps.append(marks)
    torch.cuda.synchronize()
    elapsed = [[a.elapsed_time(b) for a, b in itertools.pairwise(marks)] for marks in stamps[5:]]
    forward, backward = (sorted(column)[len(elapsed) // 2] for column in zip(*elapsed, strict=True))
    return {"forward_ms": round(forward, 4), "backward_ms": round(backward, 4)}


def bounds(qkv: Tensor, tb_s: float) -> dict[str, float]:
    """Milliseconds to move qkv and the output, and both gradients and qkv."""
    third = qkv.numel() * qkv.element_size() / 3 / (tb_s * 1e9)
    return {"bound_forward_ms": 4 * third, "bound_backward_ms": 7 * third}


if __name__ == "__main__":
    main()
