"""Retrieval of altered copies: each cell is looked for among copies of all cells. Needs curated cells, no labels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lemon.probe.task import Fold, Protocol, Task, TaskError
from lemon.probe.tasks.curated import CuratedCells

LEAST_CELLS = 10
"""Fewer say nothing: one is found by chance."""


def retrieval_task(cells: CuratedCells, *, name: str, copies: Mapping[str, np.ndarray]) -> Task:
    """Cells as queries; each entry of ``copies``, uint8 [N, 60, 60, 3], is searched as a protocol of that name.

    The copies come after all cells. Raises TaskError where there are too few cells.
    """
    n = len(cells.rows)
    if n < LEAST_CELLS:
        raise TaskError(f"{name.partition(':')[0]}: {n} cells; expected {LEAST_CELLS} at least")
    ids, times = cells.cell_ids, 1 + len(copies)
    folds = [Fold(np.arange(n * at, n * (at + 1)), np.arange(n), name="all") for at in range(1, times)]
    return Task(
        name=name,
        kind="retrieval",
        images=np.concatenate([cells.images, *copies.values()]),
        target=np.tile(ids, times),
        target_names=(),
        sample_ids=np.concatenate([ids, *(np.char.add(ids, f"_copy{at}") for at in range(1, times))]),
        groups={group: np.tile(values, times) for group, values in cells.groups.items()},
        protocols=tuple(Protocol(key, (fold,), None) for key, fold in zip(copies, folds, strict=True)),
        cluster=cells.cluster,
        counts=cells.counts,
    )


def turned(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images uint8 [N, 60, 60, 3], each turned by 90, 180 or 270 degrees, or mirrored and perhaps turned."""
    orientation, out = torch.randint(1, 8, (len(images),), generator=generator), images.clone()
    for number in range(1, 8):
        rotated = torch.rot90(images[orientation == number], number % 4, dims=(1, 2))
        out[orientation == number] = rotated.flip(2) if number >= 4 else rotated
    return out
