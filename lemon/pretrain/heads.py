"""Projection heads, their batch normalisation across workers, the moving average, and encoding in chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from lemon.pretrain.losses import at_least_float32, full_precision, sum_over_workers, world_size

M = TypeVar("M", bound=nn.Module)


class HeadBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all workers: [N, C] -> [N, C], statistics in float32.

    One worker uses PyTorch's kernel. Several use two sums over workers, with gradient; nn.SyncBatchNorm would do, but
    runs on CUDA only, and the loss must not depend on where it is computed. A single row gives the bias, where PyTorch
    raises an error.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (world_size() == 1 and len(x) > 1):
            return super().forward(x)
        with full_precision(x):
            rows = at_least_float32(x)
            sums = sum_over_workers(torch.cat([rows.sum(dim=0), rows.new_full((1,), len(rows))]))  # [C + 1]
            count = sums[-1].detach()
            mean = sums[:-1] / count  # [C]
            var = sum_over_workers((rows - mean).square().sum(dim=0)) / count  # [C], biased
            self._track(mean.detach(), var.detach() * count / (count - 1).clamp(min=1))
            y = (rows - mean) * torch.rsqrt(var + self.eps)
            y = y if self.weight is None else y * self.weight + self.bias
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_var, self.momentum)


def moco_mlp(sizes: list[int]) -> nn.Sequential:
    """MoCo v3's head: linear layers without bias, BatchNorm + ReLU between, BatchNorm without affine at the end."""
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(fan_in, fan_out, bias=False), HeadBatchNorm(fan_out, affine=i < last)]
        layers += [nn.ReLU(inplace=True)] if i < last else []
    return nn.Sequential(*layers)


class DinoHead(nn.Module):
    """DINOv2's head: a 3-layer GELU MLP, L2 normalisation of the bottleneck, and prototypes of norm 1.

    ``bottleneck`` and ``prototypes`` are apart, so that the loss can form the logits in chunks. A logit is their
    cosine. The prototypes are normalised at each use, which is weight normalisation with its gain fixed at 1.
    """

    def __init__(self, *, dim: int, hidden_dim: int, bottleneck_dim: int, n_prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def bottleneck(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, C], float32, L2-normalised."""
        x = self.mlp(x)
        with full_precision(x):
            # eps 1e-6 bounds the gradient of a bottleneck that is all but zero.
            return F.normalize(at_least_float32(x), dim=-1, eps=1e-6)

    def prototypes(self) -> Tensor:
        """[K, C], float32, L2-normalised."""
        with full_precision(self.last_layer.weight):
            return F.normalize(at_least_float32(self.last_layer.weight), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, K] of tokens [N, D], float32: bfloat16 cosines, divided by 0.04, would be off by 0.05."""
        bottleneck = self.bottleneck(x)
        with full_precision(bottleneck):
            return bottleneck @ self.prototypes().T


def frozen_copy(module: M, build: Callable[[], M]) -> M:
    """A module from ``build`` with the parameters and buffers of ``module``, which gets no gradient."""
    copy = build()
    copy.load_state_dict(module.state_dict())
    return copy.requires_grad_(False)


def ema_update(teacher: nn.Module, student: nn.Module, *, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameters only, in one fused call a device."""
    average = get_ema_multi_avg_fn(momentum)
    average(list(teacher.parameters()), list(student.parameters()), 0)


def forward_in_chunks(encode: Callable[..., Tensor], *inputs: Tensor | None, chunk: int | None) -> Tensor:
    """``encode(*inputs)`` over chunks of rows, whose activations are computed again in the backward.

    The result, the loss of the whole batch on it, and the gradients are those of one call, because ``encode`` treats
    rows one by one: so this replaces gradient accumulation, with all negatives of the batch (GradCache,
    arXiv 2101.06983, by way of checkpointing). It costs one more forward of ``encode``. Random numbers drawn inside
    (drop path) are drawn again alike; they differ from those of one call.

    Args:
        encode: [n, ...] -> [n, ...].
        inputs: tensors with equally many rows; None is passed on.
        chunk: rows a chunk; None: one call that keeps its activations.
    """
    rows = next(len(x) for x in inputs if x is not None)
    if chunk is None or rows <= chunk:
        return encode(*inputs)
    parts = []
    for start in range(0, rows, chunk):
        part = [None if x is None else x[start : start + chunk] for x in inputs]
        parts.append(checkpoint(encode, *part, use_reentrant=False) if torch.is_grad_enabled() else encode(*part))
    return torch.cat(parts)
