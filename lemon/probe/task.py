"""What every benchmark becomes before it is scored: crops, labels or targets, groups, and protocols of folds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lemon.schema import CELL_PX


class TaskError(ValueError):
    """A benchmark cannot be read or scored; one line: what was found, what was expected, how to repair it."""


@dataclass(frozen=True)
class Fold:
    """Indices of the crops that a probe is fitted on (or searches) and scored on: int64 each, disjoint."""

    train: np.ndarray
    test: np.ndarray
    name: str  # the hospital or slide that is left out, or a number


@dataclass(frozen=True)
class Protocol:
    """A way to split a task. ``inner_groups`` [N] are never divided when C or alpha is chosen; None: at random."""

    name: str  # paper, leak-free
    folds: tuple[Fold, ...]
    inner_groups: np.ndarray | None


@dataclass(frozen=True)
class Count:
    """One line of what a loader prints: how many are left after a filter, or of a class, and the paper's number."""

    what: str
    n: int
    paper: int | None = None


@dataclass(frozen=True)
class Task:
    """Crops with labels (classification), targets (regression) or copies among which they are searched (retrieval).

    Args:
        name: as on the command line.
        kind: which probe fits.
        images: uint8 [N, 60, 60, 3] RGB at 0.25 um/px, centred on the nucleus.
        target: classification: class names, str [N]; regression: float32 [N, G]; retrieval: of which crop it is one.
        target_names: the classes, or the genes [G].
        sample_ids: str [N], unique: what a prediction is stored under.
        groups: str [N] by name; ``slide`` always, ``patient``, ``hospital``, ``scanner`` where known.
        cluster: the group that the bootstrap draws (``slide``, or ``patient``).
        batch: the group that robustness compares (``hospital``, ``scanner``); None: the task has none.
        protocols: the paper's and the leak-free one; a single one where they agree.
        counts: what each filter left.
        notes: departures that a reader of the scores must know.
        place_um: float64 [N, 2], x and y of the nucleus in um, in the image that ``groups["slide"]`` names;
            None: not known.
    """

    name: str
    kind: Literal["classification", "regression", "retrieval"]
    images: np.ndarray
    target: np.ndarray
    target_names: tuple[str, ...]
    sample_ids: np.ndarray
    groups: Mapping[str, np.ndarray]
    protocols: tuple[Protocol, ...]
    cluster: str = "slide"
    batch: str | None = None
    counts: tuple[Count, ...] = ()
    notes: tuple[str, ...] = field(default=())
    place_um: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.shape[1:] != (CELL_PX, CELL_PX, 3) or self.images.dtype != np.uint8:
            raise ValueError(
                f"{self.name}: images {self.images.dtype} {self.images.shape}; expected uint8 [N, 60, 60, 3]"
            )
        columns = {"target": self.target, "sample_ids": self.sample_ids, **self.groups}
        columns |= {} if self.place_um is None else {"place_um": self.place_um}
        wrong = [name for name, column in columns.items() if len(column) != n]
        if wrong:
            raise ValueError(f"{self.name}: {wrong[0]} has {len(columns[wrong[0]])} values for {n} images")


@dataclass(frozen=True)
class TaskEntry:
    """What is known of a benchmark before its data are there.

    Args:
        folder: below the folder ``data``.
        load: ``load(folder, *, seed=0) -> Task``; raises TaskError where a file is not as expected.
        obtain: how to get the data, one line.
        patients: ``patients(folder) -> names``, of patients or slides that a table of cells could have too, so that
            they are left out of pretraining; of a folder that may be at s3://. None: no such name is known.
    """

    folder: str
    load: Callable[..., Task]
    obtain: str
    patients: Callable[[str], Collection[str]] | None = None
