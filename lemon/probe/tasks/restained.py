"""``restained:PATH``: does an embedding know a cell again when it is turned and its stain differs? Needs no labels.

PATH is an output of ``lemon curate``. Each of ``n_cells`` cells of lowest rank gets a copy: turned by 90, 180 or 270
degrees or mirrored, and with other amounts of hematoxylin and eosin (Macenko's stains of the cell itself, their
concentrations scaled and shifted as in the policy ``a1_macenko``). The score is the share of cells whose nearest copy
(cosine) is their own, among all copies. Chance is 1 / ``n_cells``.

Good for: seeing within minutes that training makes features of the cell rather than of its stain and position, and
comparing runs on one's own slides. Not good for: choosing between encoders that both know every cell again, or saying
that features tell cell *types*; that takes labels.
"""

from __future__ import annotations

import numpy as np
import torch

from lemon.probe.folds import LEAK_FREE
from lemon.probe.task import Fold, Protocol, Task, TaskError
from lemon.probe.tasks.curated import CuratedCells, read_cells
from lemon.views.macenko import draw_perturbations, perturb_stains
from lemon.views.policy import load_policy

POLICY = "a1_macenko"
"""Whose ranges of stain the copies are drawn from."""

LEAST_CELLS = 10
"""Fewer say nothing: one is found by chance."""

_CHUNK = 1024


def load(folder: str, *, seed: int = 0, n_cells: int = 10_000) -> Task:
    """Retrieval of re-stained copies of a table's cells; raises TaskError where there is none, or of too few cells."""
    return retrieval_task(read_cells(folder, task="restained", n_cells=n_cells), name=f"restained:{folder}", seed=seed)


def retrieval_task(cells: CuratedCells, *, name: str, seed: int) -> Task:
    """Cells as queries and their copies as what is searched; the copies come after all cells."""
    n = len(cells.rows)
    if n < LEAST_CELLS:
        raise TaskError(f"restained: {n} cells; expected {LEAST_CELLS} at least")
    images, ids = cells.images, cells.cell_ids
    everything = Fold(train=np.arange(n, 2 * n), test=np.arange(n), name="all")
    return Task(
        name=name,
        kind="retrieval",
        images=np.concatenate([images, restained_copies(images, seed=seed)]),
        target=np.concatenate([ids, ids]),
        target_names=(),
        sample_ids=np.concatenate([ids, np.char.add(ids, "_copy")]),
        groups={group: np.concatenate([values, values]) for group, values in cells.groups.items()},
        protocols=(Protocol(LEAK_FREE, (everything,), None),),
        cluster=cells.cluster,
        counts=cells.counts,
    )


def restained_copies(images: np.ndarray, *, seed: int) -> np.ndarray:
    """A copy of each image, uint8 [N, 60, 60, 3], in another stain and one of the seven other orientations."""
    stain, copies = load_policy(POLICY).stain, []
    generator = torch.Generator().manual_seed(seed)
    for part in torch.from_numpy(images).split(_CHUNK):
        draw = draw_perturbations(
            count=len(part), p=1.0, scale=stain.alpha, shift=stain.beta, generator=generator, device=part.device
        )
        (stained,) = perturb_stains(part, [draw])
        orientation = torch.randint(1, 8, (len(part),), generator=generator)
        for number in range(1, 8):
            turned = torch.rot90(stained[orientation == number], number % 4, dims=(1, 2))
            stained[orientation == number] = turned.flip(2) if number >= 4 else turned
        copies.append(stained)
    return torch.cat(copies).numpy()
