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
from lemon.probe.task import Task
from lemon.probe.tasks.copies import retrieval_task, turned
from lemon.probe.tasks.curated import read_cells
from lemon.views.macenko import draw_perturbations, perturb_stains
from lemon.views.policy import load_policy

POLICY = "a1_macenko"
"""Whose ranges of stain the copies are drawn from."""

_CHUNK = 1024


def load(folder: str, *, seed: int = 0, n_cells: int = 10_000) -> Task:
    """Retrieval of re-stained copies of a table's cells; raises TaskError where there is none, or of too few cells."""
    cells = read_cells(folder, task="restained", n_cells=n_cells)
    copies = {LEAK_FREE: restained_copies(cells.images, seed=seed)}
    return retrieval_task(cells, name=f"restained:{folder}", copies=copies)


def restained_copies(images: np.ndarray, *, seed: int) -> np.ndarray:
    """A copy of each image, uint8 [N, 60, 60, 3], in another stain and one of the seven other orientations."""
    stain, copies = load_policy(POLICY).stain, []
    generator = torch.Generator().manual_seed(seed)
    for part in torch.from_numpy(images).split(_CHUNK):
        draw = draw_perturbations(
            count=len(part), p=1.0, scale=stain.alpha, shift=stain.beta, generator=generator, device=part.device
        )
        (stained,) = perturb_stains(part, [draw])
        copies.append(turned(stained, generator))
    return torch.cat(copies).numpy()
