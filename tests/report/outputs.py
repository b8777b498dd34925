"""Outputs of a real sweep and of real probes, tiny, with their MLflow, for tests of the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lemon.encoders.config import EncoderConfig
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.vit import build_vit, seeded
from lemon.errors import EXIT_FAILURES
from lemon.probe import job as probe
from lemon.probe.config import ProbeConfig
from lemon.probe.task import Task
from lemon.runtime.config import load
from lemon.sweep import grid
from lemon.sweep import job as sweep
from lemon.sweep import trial as trials
from lemon.sweep.config import Study, SweepConfig
from tests.sweep.studies import light_task, sweep_words, write_cells

SCRIPT = "<script>alert('a1')</script>"
"""Name of a point."""


def open_light(name: str, data: Path, *, seed: int = 0) -> Task:
    """In place of the catalogue of benchmarks: bright and dark nuclei, a quarter of them labelled at random."""
    task, generator = light_task(), np.random.default_rng(2)
    target = np.where(generator.random(len(task.target)) < 0.25, generator.permutation(task.target), task.target)
    return dataclasses.replace(task, target=target)


def write_outputs(folder: Path, patch: pytest.MonkeyPatch) -> str:
    """``out`` (a sweep of two points with two seeds, and one that fails) and ``probe``; returns MLflow's address."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    for module in (grid, trials, probe):
        patch.setattr(module, "open_task", open_light)
    write_cells(folder / "cells")
    points = [
        {"name": "a0", "value": "a0", "overrides": {"views": "a0"}},
        {"name": SCRIPT, "value": "a1", "overrides": {"views": "a1"}},
        {"name": "wild", "value": "wild", "overrides": {"ssl": {"base_lr": 1e30}}},
    ]
    words = sweep_words(folder, "seeds=[0,1]", "pretrain.epochs=4", "pretrain.checkpoint_every=100")
    study = Study.model_validate({"name": "augmentation", "points": points})
    config = load("scaling_sweep", words, SweepConfig).model_copy(update={"sweep": study})
    assert sweep.main(config) == EXIT_FAILURES
    write_probes(folder)
    return uri


def write_probes(folder: Path) -> None:
    """Two encoders of random weights, scored on the same task."""
    for seed in (0, 1):
        with seeded(1 + seed):  # 0 is the untrained encoder that stands beside them
            vit = build_vit(EncoderConfig(name="small", dim=32, depth=1, heads=2))
        export_encoder(vit, folder / f"enc{seed}", cell_input=CellInput(mean=(0.5,) * 3, std=(0.2,) * 3))
    models = [str(folder / f"enc{seed}") for seed in (0, 1)]
    assert probe.main(ProbeConfig(models=models, tasks=["light"], output=str(folder / "probe"), bootstrap=100)) == 0
