"""Schedules as pure functions of the fractional epoch, and what a method offers to the training loop.

The loop (plain torch, one process or DistributedDataParallel) does::

    schedules = method.schedules(epochs=150, steps_per_epoch=244, batch=4096)
    optimizer = torch.optim.AdamW(method.param_groups(), betas=method.config.betas)
    for step in range(schedules.steps):
        values = schedules.at(step)
        set_optimizer(optimizer, values)
        method.before_step(values)                       # MoCo v3: EMA, before the keys are computed
        parts = wrapped(views, values=values)            # the method, or DistributedDataParallel around it
        parts["loss"].backward()
        method.clip_gradients()
        optimizer.step()
        method.after_step(values)                        # DINOv2: EMA
        optimizer.zero_grad()

A value depends on the step alone, so a resumed run needs no state of the schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lemon.encoders.vit import CellTransformer
from lemon.runtime.compiling import compile_kept

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """One value over a run: linear from 0 to ``start`` in ``warmup_epochs``, then to ``end`` at epoch ``until_epoch``.

    After ``until_epoch`` it stays at ``end``. A constant has start equal to end.
    """

    start: float
    end: float
    until_epoch: float
    warmup_epochs: float = 0.0
    shape: Literal["cosine", "linear"] = "cosine"

    def __call__(self, epoch: float) -> float:
        """The value at a fractional epoch >= 0."""
        if epoch < self.warmup_epochs:
            return self.start * epoch / self.warmup_epochs
        if epoch >= self.until_epoch:
            return self.end
        share = (epoch - self.warmup_epochs) / (self.until_epoch - self.warmup_epochs)
        progress = share if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class StepValues:
    """What one optimiser step uses."""

    epoch: float
    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """The curves of a run of ``epochs`` (may be fractional) of ``steps_per_epoch`` optimiser steps."""

    epochs: float
    steps_per_epoch: int
    lr: Curve
    weight_decay: Curve
    momentum: Curve
    teacher_temperature: Curve
    freeze_last_layer_epochs: float = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return round(self.epochs * self.steps_per_epoch)

    def at(self, step: int) -> StepValues:
        """The values of optimiser step ``step``, counted from 0."""
        epoch = step / self.steps_per_epoch
        lr = self.lr(epoch)
        return StepValues(
            epoch=epoch,
            lr=lr,
            last_layer_lr=0.0 if epoch < self.freeze_last_layer_epochs else lr,
            weight_decay=self.weight_decay(epoch),
            momentum=self.momentum(epoch),
            teacher_temperature=self.teacher_temperature(epoch),
        )


def param_group(
    params: Iterable[nn.Parameter], *, lr_scale: float = 1.0, wd_scale: float = 1.0, last_layer: bool = False
) -> dict[str, Any]:
    """A parameter group for AdamW, with the factors that ``set_optimizer`` applies at each step."""
    return {"params": list(params), "lr_scale": lr_scale, "wd_scale": wd_scale, "last_layer": last_layer}


def set_optimizer(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Write the learning rate and weight decay of this step into the optimiser's groups."""
    for group in optimizer.param_groups:
        group["lr"] = (values.last_layer_lr if group["last_layer"] else values.lr) * group["lr_scale"]
        group["weight_decay"] = values.weight_decay * group["wd_scale"]


@lru_cache
def whole_graph(function: Callable[..., T]) -> Callable[..., T]:
    """The function compiled without breaks, for each shape anew."""
    return compile_kept(function, fullgraph=True, dynamic=False)


class Method(nn.Module, ABC):
    """A self-supervised method as the loop sees it; calling it computes the loss.

    Its ``state_dict()`` holds encoder, heads, teacher and centres: with the optimiser's state and the step, all that
    a restart needs. Subclasses set ``config``, ``encoder`` and ``teacher``.
    """

    config: Any
    """Frozen settings of the method; the loop reads ``betas``."""
    encoder: CellTransformer
    """The student's backbone."""
    teacher: CellTransformer
    """The EMA backbone; gets no gradient."""
    n_global_views = 2
    """Views of the encoder's crop size, first in the list of views."""
    compiled = False
    """Whether ``run`` compiles."""

    @property
    def n_local_views(self) -> int:
        """Views of ``config.local_crop_px``, after the global ones."""
        return 0

    def run(self, function: Callable[..., T]) -> Callable[..., T]:
        """The function, which takes an encoder and tensors; compiled, it is one graph for each shape."""
        return whole_graph(function) if self.compiled else function

    @property
    @abstractmethod
    def exported(self) -> CellTransformer:
        """The backbone to evaluate and export."""

    @abstractmethod
    def forward(
        self, views: Sequence[Tensor], *, values: StepValues, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """``{"loss": ..., parts...}``: scalars on the device, without a synchronisation with the host.

        Args:
            views: float [B, 3, px, px] each, normalised; row i of every view is the same cell.
            values: the schedules at this step.
            generator: draws what the method draws itself (DINOv2: masks); on the device of the views.
        """

    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW, made by ``param_group``; frozen parameters are left out."""

    @abstractmethod
    def schedules(self, *, epochs: float, steps_per_epoch: int, batch: int) -> Schedules:
        """The curves of a run; ``batch`` is that of all workers together."""

    @abstractmethod
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student."""

    def clip_gradients(self) -> Tensor | None:
        """Clip as the method's paper does; returns the norm before (a scalar on the device), None where unlimited."""
        return None

    def before_step(self, values: StepValues) -> None:
        """Called once an optimiser step, before the loss."""

    def after_step(self, values: StepValues) -> None:
        """Called once an optimiser step, after it."""
