"""Checkpoints of a pretraining run: whole, atomic, the newest few and the best kept."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import IO, Any

import torch

from lemon.runtime.store import Store

FOLDER = "checkpoints"
_NAME = re.compile(rf"{FOLDER}/step-(\d+)\.pt$")
BEST = f"{FOLDER}/best.json"


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run's output.

    A checkpoint holds the method (encoder, heads, teacher, centres), the optimiser, the step and the config. The
    sampler, the views and stochastic depth draw from (seed, step), so the step is all that they need to go on.
    """

    store: Store
    keep: int = 2

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, rising."""
        found = (_NAME.match(name) for name in self.store.list(FOLDER, suffix=".pt"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
        """Write a checkpoint, then drop those that are neither among the newest nor the best.

        Args:
            state: tensors, numbers, strings and containers of them (what ``weights_only=True`` opens).
            step: optimiser steps that were done.
            score: higher is better; the best so far is kept.

        Raises OSError where it cannot be written, as on a full disk; the earlier ones stay.
        """
        with self.store.write(self._name(step)) as stream:
            _save({**state, "step": step}, stream)
        if score is not None and score > self.best()[1]:
            self.store.write_json(BEST, {"step": step, "score": score})
        kept = {*self.steps()[-self.keep :], self.best()[0]}
        for old in self.steps():
            if old not in kept:
                self.store.delete(self._name(old))

    def best(self) -> tuple[int, float]:
        """Step and score of the best checkpoint; (-1, -inf) where none was scored."""
        if not self.store.exists(BEST):
            return -1, float("-inf")
        mark = self.store.read_json(BEST)
        return int(mark["step"]), float(mark["score"])

    def load(self, step: int | None = None, *, device: torch.device | str = "cpu") -> dict[str, Any] | None:
        """The state at a step, or the newest; None where there is none."""
        steps = self.steps()
        if step is None and not steps:
            return None
        content = self.store.read_bytes(self._name(steps[-1] if step is None else step))
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        return state

    def _name(self, step: int) -> str:
        return f"{FOLDER}/step-{step:08d}.pt"


def _save(state: dict[str, Any], stream: IO[bytes]) -> None:
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the disk's own error, which torch covers with one of its format
            raise error.__context__ from None
        raise
