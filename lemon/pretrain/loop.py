"""The training loop: plain torch, one process or DistributedDataParallel, no Ray. Nothing in a step waits for the host.

All randomness is drawn from (seed, step, rank), so a run that resumes at a step equals one that never stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lemon.cells.batches import Feed
from lemon.encoders.features import effective_rank, encode_cells
from lemon.encoders.finite import not_finite
from lemon.errors import FatalError, one_line
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.online_probe import LABELLED_METRIC
from lemon.pretrain.schedules import Method, Schedules, set_optimizer
from lemon.runtime.console import stage_logger
from lemon.views.make import make_local_views, make_views
from lemon.views.policy import Policy

logger = stage_logger(__name__, "pretrain")

COLLAPSED_RANK = 1.5
"""Features of different cells that use fewer directions than this carry no information."""

Log = Callable[[Mapping[str, float], int], None]
Probe = Callable[[nn.Module], dict[str, float]]


class TrainingStoppedError(FatalError):
    """Training cannot go on usefully; the message says why and which checkpoint is good."""

    remedy = ""


@dataclass
class Trainer:
    """One worker's training. Build it, then call ``run``.

    Args:
        method: a self-supervised method on its device.
        feed: this worker's batches.
        policy: how views are made.
        schedules: of the whole run.
        seed: of views, masks and stochastic depth.
        checkpoints: where state goes; only rank 0 writes.
        config: JSON-able settings, kept in checkpoints.
        log: (metrics, step), called every ``log_every`` steps on rank 0; None logs nothing.
        probe: scores the exported encoder; called with each checkpoint on rank 0, and where it fails costs a line.
        watched: uint8 [N, 60, 60, 3], cells on which the effective rank is taken.
    """

    method: Method
    feed: Feed
    policy: Policy
    schedules: Schedules
    seed: int
    checkpoints: Checkpoints
    config: dict[str, Any]
    log: Log | None = None
    probe: Probe | None = None
    watched: np.ndarray | None = None
    log_every: int = 50
    checkpoint_every: int = 1000
    bf16: bool = False
    compiled: bool = False
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._device = self.feed.device
        fused = {"fused": True} if self._device.type == "cuda" else {"foreach": True}
        self._optimizer = torch.optim.AdamW(self.method.param_groups(), betas=self.method.config.betas, **fused)
        self._generator = torch.Generator(device=self._device)
        self.method.compiled = self.compiled
        if self.compiled:
            torch.compiler.reset()  # graphs of earlier trainers in this process, whose number torch limits
        self._call: Any = DistributedDataParallel(self.method) if self.feed.world > 1 else self.method

    def resume(self) -> int:
        """Load the newest checkpoint that is whole, if any; returns the step that comes next.

        Damaged ones are put aside, with a line.
        """
        state, faults = self.checkpoints.newest(device=self._device)
        if state is not None:
            self.method.load_state_dict(state["method"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        if faults and self.feed.rank == 0:
            message = f"training goes on from step {self.step:,}" if self.step else "training begins anew"
            aside = {self.checkpoints.put_aside(self.checkpoints.name(step)): fault for step, fault in faults.items()}
            damaged = [f"{path} ({fault})" for path, fault in aside.items()]
            logger.warning(f"{message}; put aside as damaged: {'; '.join(damaged)}")
        return self.step

    def run(self, *, until: int | None = None, on_checkpoint: Callable[[int], None] | None = None) -> None:
        """Train to the end of the schedules, or to step ``until``.

        Raises TrainingStoppedError for a loss that is not finite and for collapsed features; good checkpoints stay.
        """
        last = min(until or self.schedules.steps, self.schedules.steps)
        self.method.train()
        window = _Window(self.feed)
        for images in self.feed.batches(self.step, last):
            window.add(self.train_step(images))
            due = self.step % self.checkpoint_every == 0 or self.step == last
            if due or self.step % self.log_every == 0:
                self._report(window)  # also before a checkpoint, so that no broken state is saved
                window = _Window(self.feed)
            if due:
                self._checkpoint()
                if on_checkpoint is not None:
                    on_checkpoint(self.step)

    def train_step(self, images: Tensor) -> dict[str, Tensor]:
        """One optimiser step on uint8 [b, 60, 60, 3]; returns the parts of the loss as scalars on the device."""
        values = self.schedules.at(self.step)
        set_optimizer(self._optimizer, values)
        self._seed_step()
        views = self._views(images)
        self.method.before_step(values)
        with self._autocast():
            parts = self._call(views, values=values, generator=self._generator)
        parts["loss"].backward()
        norm = self.method.clip_gradients()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.method.after_step(values)
        self.step += 1
        return {name: part.detach() for name, part in parts.items()} | ({} if norm is None else {"grad_norm": norm})

    def _views(self, images: Tensor) -> list[Tensor]:
        views = list(make_views(images, policy=self.policy, generator=self._generator, compiled=self.compiled))
        if count := self.method.n_local_views:
            size = self.method.config.local_crop_px
            local = make_local_views(
                images, policy=self.policy, generator=self._generator, count=count, size_px=size, compiled=self.compiled
            )
            views.append(local)  # [count * B, 3, size, size]
        return views

    def _seed_step(self) -> None:
        seed = int(np.random.SeedSequence([self.seed, self.step, self.feed.rank]).generate_state(1, np.uint64)[0] >> 1)
        self._generator.manual_seed(seed)
        torch.manual_seed(seed)  # stochastic depth draws from the global generator

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _report(self, window: _Window) -> None:
        """The one place where a step waits for the device."""
        metrics = window.metrics()
        if not np.isfinite(metrics["loss"]):
            raise TrainingStoppedError(f"the loss became {metrics['loss']} before step {self.step}; {self._good()}")
        values = self.schedules.at(max(0, self.step - 1))
        if self.log is not None and self.feed.rank == 0:
            scheduled = {"lr": values.lr, "weight_decay": values.weight_decay, "momentum": values.momentum}
            self.log({**metrics, **scheduled, "epoch": self.step / self.schedules.steps_per_epoch}, self.step)

    def _checkpoint(self) -> None:
        metrics = self._indicators()
        state = {"method": self.method.state_dict(), "optimizer": self._optimizer.state_dict()}
        if (wrong := next(not_finite(state), None)) is not None:  # on every worker, so that all stop alike
            raise TrainingStoppedError(f"{wrong} is not finite at step {self.step}; {self._good()}")
        if self.feed.rank == 0:
            score = metrics.get(LABELLED_METRIC)
            self.checkpoints.save({**state, "config": json.dumps(self.config)}, step=self.step, score=score)
            if self.log is not None and metrics:
                self.log(metrics, self.step)

    def _indicators(self) -> dict[str, float]:
        """Effective rank and scores of the probe; raises before a collapsed state could be saved.

        Every worker computes the rank, so that all stop alike.
        """
        metrics = {}
        if self.watched is not None:
            images = torch.from_numpy(self.watched).to(self._device)
            encoder: Any = self.method.exported
            crop_px = encoder.patch_embed.img_size[0]
            features = encode_cells(encoder, images, mean=self.policy.mean, std=self.policy.std, crop_px=crop_px)
            rank = metrics["effective_rank"] = float(effective_rank(features))
            if not rank >= COLLAPSED_RANK:
                raise TrainingStoppedError(
                    f"features collapsed by step {self.step}: effective rank {rank:.2f}; {self._good()}"
                )
        if self.probe is not None and self.feed.rank == 0:
            try:
                metrics |= self.probe(self.method.exported)
            except Exception as error:  # whatever it is, training goes on  # noqa: BLE001
                logger.warning(f"the encoder of step {self.step:,} is not scored: {one_line(error)}")
        return metrics

    def _good(self) -> str:
        steps = self.checkpoints.steps()
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"


class _Window:
    """Sums over the steps between two reports, on the device."""

    def __init__(self, feed: Feed) -> None:
        self._feed, self._wait_s, self._start = feed, feed.wait_s, time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Means of the window, throughput of all workers, share of time that this worker waited for data."""
        names = list(self._sums)
        means = (torch.stack([self._sums[name].float() for name in names]) / self._steps).tolist()
        elapsed = time.perf_counter() - self._start
        return dict(zip(names, means, strict=True)) | {
            "images_per_s": self._steps * self._feed.batch / elapsed,
            "data_wait_share": (self._feed.wait_s - self._wait_s) / elapsed,
        }
