"""Checkpoints of a pretraining run: whole, atomic, held against their digests, the newest few and the best kept.

The digest is that of the store's record beside every file that it writes (lemon.runtime.records).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import uuid
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch

from lemon.encoders.finite import not_finite
from lemon.errors import DamagedError
from lemon.runtime.store import Store
from lemon.runtime.tensors import read_weights

CHECKPOINT_FOLDER, DAMAGED = "checkpoints", "damaged"
_NAME = re.compile(rf"{CHECKPOINT_FOLDER}/step-(\d+)\.pt$")
BEST = f"{CHECKPOINT_FOLDER}/best.json"
HELD = {"method", "optimizer", "step"}


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
        matches = (_NAME.match(name) for name in self.store.list(CHECKPOINT_FOLDER, suffix=".pt"))
        return sorted(int(match[1]) for match in matches if match)

    def save(self, state: dict[str, Any], *, step: int, score: float | None = None) -> None:
        """Write a checkpoint, then drop those that are neither among the newest nor the best.

        Args:
            state: tensors, numbers, strings and containers of them (what ``weights_only=True`` opens).
            step: optimiser steps that were done.
            score: higher is better; the best so far is kept.

        Raises OSError where it cannot be written, as on a full disk; the earlier ones stay.
        """
        with self.store.write(self.name(step)) as stream:
            _save({**state, "step": step}, stream)
        if score is not None and score > self.best()[1]:
            if not self.store.records.agree(BEST):
                self.put_aside(BEST)
            self.store.write_json(BEST, {"step": step, "score": score})
        kept = {*self.steps()[-self.keep :], self.best()[0]}
        for old in self.steps():
            if old not in kept:
                self.store.delete(self.name(old))

    def best(self) -> tuple[int, float]:
        """Step and score of the best checkpoint; (-1, -inf) where none was scored, or its mark is damaged."""
        try:
            mark = self.store.read_json(BEST)
            return int(mark["step"]), float(mark["score"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return -1, float("-inf")

    def newest(self, *, device: torch.device | str = "cpu") -> tuple[dict[str, Any] | None, dict[int, str]]:
        """The state of the newest checkpoint that is whole, and what is wrong with later ones, by their steps."""
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                return self.load(step, device=device), faults
            except DamagedError as error:
                faults[step] = str(error)
            except FileNotFoundError:  # put aside by another worker since it was listed
                continue
        return None, faults

    def load(self, step: int, *, device: torch.device | str = "cpu") -> dict[str, Any]:
        """The state at a step. Raises DamagedError, the reason, where it is not what was written or is of no use."""
        content = self.store.read_bytes(self.name(step))
        known = {record.sha256 for record in self.store.records.of(self.name(step))}
        if known and hashlib.sha256(content).hexdigest() not in known:
            raise DamagedError("its content is not what was written")
        try:
            state: Any = read_weights(content, label="checkpoint", device=device)
        except DamagedError as error:
            raise DamagedError(f"cut short, or no checkpoint ({len(content):,} bytes)") from error
        if not isinstance(state, dict) or not state.keys() >= HELD:
            raise DamagedError("no checkpoint of pretraining")
        if (wrong := next(not_finite(state), None)) is not None:
            raise DamagedError(f"{wrong} holds values that are not finite")
        return state

    def put_aside(self, name: str) -> str:
        """Move a file that is damaged into ``damaged/``, so that its name is free again; returns where it is now."""
        base = PurePosixPath(name)
        aside = f"{DAMAGED}/{base.stem}-{uuid.uuid4().hex[:8]}{base.suffix}"
        if self.store.is_local:
            Path(self.store.path(DAMAGED)).mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.store.filesystem.move(self.store.path(name), self.store.path(aside))
            self.store.records.forget(name)
        return f"{self.store.uri}/{aside}"

    def name(self, step: int) -> str:
        """The file of a step, in the output."""
        return f"{CHECKPOINT_FOLDER}/step-{step:08d}.pt"


def _save(state: dict[str, Any], stream: IO[bytes]) -> None:
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # the disk's own error, which torch covers with one of its format
            raise error.__context__ from None
        raise
