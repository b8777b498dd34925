"""A small table of cells, a task and the words of a tiny sweep, for tests of trials and sweeps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lemon.probe.task import Task
from lemon.runtime.store import Store
from tests.cells_table import synthetic_crops, write_slide
from tests.probe.made_up import task_of

ORGANS = ("breast", "colon", "lung")

TINY = [
    "variant=smoke",
    "pretrain.encoder.dim=32",
    "pretrain.encoder.depth=1",
    "pretrain.encoder.heads=2",
    "pretrain.ssl.hidden_dim=32",
    "pretrain.ssl.out_dim=16",
    "pretrain.batch=16",
    "pretrain.images_per_epoch=32",
    "pretrain.log_every=1",
    "pretrain.checkpoint_every=2",
    "pretrain.device=cpu",
]


def write_cells(folder: str | Path, *, per_slide: int = 20) -> str | Path:
    """Six slides, two of each organ."""
    for number in range(6):
        slide = {"organ": ORGANS[number % 3], "patient_id": f"p{number}"}
        write_slide(Store(folder), f"s{number}", synthetic_crops(per_slide, seed=number), **slide)
    return folder


def light_task() -> Task:
    """Bright and dark nuclei on six slides: even an encoder of random weights tells them apart."""
    images = synthetic_crops(120).copy()
    bright = np.random.default_rng(0).random(120) < 0.5
    images[bright] = images[bright] // 2 + 127
    slide = np.array([f"s{i}" for i in np.random.default_rng(1).integers(0, 6, 120)])
    return task_of(images, np.where(bright, "bright", "dark"), slide, name="light")


def sweep_words(folder: Path, *words: str) -> list[str]:
    """A sweep of two views in ``folder``, which holds ``cells``; their slides have the names of a labelled folder's."""
    places = [f"cells={folder / 'cells'}", f"output={folder / 'out'}", f"pretrain.cache={folder / 'cache'}"]
    return [
        *TINY,
        *places,
        f"data={folder / 'data'}",
        "tasks=light",
        "exclude_benchmarks=[]",
        "sweep.points=[a0,a1]",
        *words,
    ]
