"""The training loop: windows are drawn and varied on the device where the images stay; a step never waits for the host.

All randomness is drawn from (seed, step, rank), so a run that resumes at a step goes on as one that never stopped.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lemon.errors import FatalError
from lemon.nuclei.hoverfast import HoverFastNet
from lemon.nuclei.training.augment import Appearance, vary
from lemon.nuclei.training.loss import HoverFastLoss
from lemon.nuclei.training.targets import make_targets
from lemon.nuclei.training.windows import Bank, Geometry, draw

Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Recipe:
    """How the network is trained.

    Attributes:
        steps: optimiser steps of the whole run.
        batch, window_px: of a step, on one worker.
        learning_rate: highest; it rises over ``warmup_steps`` and falls with half a cosine to 0.
        average: decay of the averaged weights, less at the beginning.
        bf16: multiply in bfloat16.
    """

    steps: int = 2000
    batch: int = 64
    window_px: int = 256
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 40
    average: float = 0.999
    geometry: Geometry = field(default_factory=Geometry)
    appearance: Appearance = field(default_factory=Appearance)
    bf16: bool = False
    seed: int = 0


class TrainingStoppedError(FatalError):
    """Training cannot go on usefully; the message says why."""


@dataclass
class SegmenterTrainer:
    """One worker's training of one network; ``averaged`` is what comes out.

    Args:
        net: on the bank's device.
        bank: images to learn from.
        recipe: how.
        criterion: the loss, on the same device.
        rank, world: of this worker.
        log: (metrics, step), called every ``log_every`` steps on rank 0.
    """

    net: HoverFastNet
    bank: Bank
    recipe: Recipe
    criterion: HoverFastLoss
    rank: int = 0
    world: int = 1
    log: Log | None = None
    log_every: int = 50
    step: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        device = self.bank.device
        self.net.to(memory_format=torch.channels_last)
        self.averaged = copy.deepcopy(self.net).requires_grad_(False)
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            fused=fused,
            foreach=not fused,
        )
        self._pairs = [
            [value for value in net.state_dict().values() if value.is_floating_point()]
            for net in (self.averaged, self.net)
        ]
        self._generator = torch.Generator(device=device)
        self._call: Any = DistributedDataParallel(self.net) if self.world > 1 else self.net

    def run(self, *, until: int) -> None:
        """Train until so many steps are done. Raises TrainingStoppedError for a loss that is not finite."""
        self.net.train()
        sums: dict[str, Tensor] = {}
        began, first = time.perf_counter(), self.step
        while self.step < until:
            parts = self.train_step()
            sums = {name: part + sums.get(name, 0.0) for name, part in parts.items()}
            if self.step % self.log_every == 0 or self.step == until:
                count = (self.step - first) * self.recipe.batch * self.world
                self._report(sums, windows=count, began=began)
                sums, began, first = {}, time.perf_counter(), self.step

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step; returns the terms of the loss as scalars on the device."""
        recipe = self.recipe
        rate = self._rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        host = np.random.default_rng((recipe.seed, self.step, self.rank))
        self._generator.manual_seed(int(host.integers(2**62)))
        windows = draw(
            self.bank, batch=recipe.batch, size_px=recipe.window_px, geometry=recipe.geometry, generator=self._generator
        )
        targets = make_targets(windows)
        images = vary(windows.images, recipe.appearance, generator=self._generator, host=host)
        with torch.autocast(self.bank.device.type, torch.bfloat16, enabled=recipe.bf16):
            logits, hv_maps = self._call(images.contiguous(memory_format=torch.channels_last))
        terms = self.criterion(logits, hv_maps, targets)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return {name: term.detach() for name, term in terms.items()} | {"count": torch.ones((), device=logits.device)}

    def _rate(self) -> float:
        rise = min(1.0, (self.step + 1) / max(self.recipe.warmup_steps, 1))
        return self.recipe.learning_rate * rise * (1 + math.cos(math.pi * self.step / self.recipe.steps)) / 2

    @torch.no_grad()
    def _average(self) -> None:
        # Less at the beginning, so that the weights that the network began with are forgotten.
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        means, values = self._pairs
        torch._foreach_lerp_(means, values, 1 - decay)

    def _report(self, sums: dict[str, Tensor], *, windows: int, began: float) -> None:
        """The one place where the host waits for the device."""
        count = float(sums.pop("count"))
        metrics = {name: float(value) / count for name, value in sums.items()}
        metrics["loss"] = sum(metrics.values())
        if not math.isfinite(metrics["loss"]):
            raise TrainingStoppedError(f"the loss became {metrics['loss']} before step {self.step}")
        if self.log is not None and self.rank == 0:
            speed = windows / (time.perf_counter() - began)
            self.log(metrics | {"lr": self._rate(), "windows_per_s": speed}, self.step)

    def state(self) -> dict[str, Any]:
        """What ``load_state`` needs to go on."""
        return {
            "method": self.net.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.net.load_state_dict(state["method"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
