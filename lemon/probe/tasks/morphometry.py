"""``morphometry:PATH``: does an embedding tell a nucleus' size, shape and stain? Needs no labels, only curated cells.

PATH is an output of ``lemon curate``, absolute or below the working folder. Targets are what curation measured inside
the outline, which the encoder does not see: area, eccentricity, solidity, hematoxylin density, each standardised. This
is no benchmark of the paper; it tells on one's own slides, within minutes, whether an encoder has learned anything.

Folds are by slide where there are five or more, else by square of 250 um, whose nuclei are neighbours. ``n_cells`` of
lowest rank are taken.
"""

from __future__ import annotations

import numpy as np

from lemon.probe.folds import leak_free
from lemon.probe.task import Task
from lemon.probe.tasks.assemble import check_protocols
from lemon.probe.tasks.curated import read_cells
from lemon.schema import MORPHOMETRICS


def load(folder: str, *, seed: int = 0, n_cells: int = 20_000) -> Task:
    """Regression of the morphometrics of a cells table; raises TaskError where there is none, or of too few cells."""
    cells = read_cells(folder, task="morphometry", n_cells=n_cells, columns=MORPHOMETRICS)
    protocols = (leak_free(cells.groups[cells.cluster], seed=seed),)
    return Task(
        name=f"morphometry:{folder}",
        kind="regression",
        images=cells.images,
        target=standardised(np.stack([cells.rows[name].to_numpy() for name in MORPHOMETRICS], axis=1)),
        target_names=MORPHOMETRICS,
        sample_ids=cells.cell_ids,
        groups=cells.groups,
        protocols=protocols,
        cluster=cells.cluster,
        counts=cells.counts,
        notes=(f"folds are by {cells.cluster}", *check_protocols("morphometry", protocols, labels=None)),
    )


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns [N, G] with mean 0 and standard deviation 1, float32; a constant column stays 0."""
    spread = values.std(axis=0)
    return ((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)
