"""Which cells to label next: uncertain ones that are different from each other.

Without a head, the pool is clustered into as many groups as labels are wanted, and the most typical cell of each is
taken. With one, the same is done among the ten times as many cells that it is least sure of, each weighed by how unsure
it is (Zhdanov, Diverse mini-batch active learning, 2019). ``python -m benchmarks.annotator`` compares this with chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import StandardScaler

from lemon.embed.stream import directions

CANDIDATES = 10
"""Unsure cells among which each label is sought."""

_LEAST_WEIGHT = 0.02


def choose_next(
    vectors: np.ndarray, labelled: Sequence[int], probability: np.ndarray | None, *, count: int, seed: int
) -> list[int]:
    """Rows to label next, ``count`` or all that are left, those of the largest groups first.

    Args:
        vectors: float32 [N, D] of the pool, labelled cells among them.
        labelled: rows that are labelled.
        probability: of classes [N, K] by the head so far; None: there is none.
        seed: of the clusters.
    """
    weight = np.ones(len(vectors)) if probability is None else np.maximum(unsureness(probability), _LEAST_WEIGHT)
    free = np.setdiff1d(np.arange(len(vectors)), np.asarray(labelled, np.int64))
    if probability is not None:
        free = free[np.argsort(-weight[free], kind="stable")[: CANDIDATES * count]]
    if len(free) <= count:
        return [int(row) for row in free]
    unit = directions(StandardScaler().fit_transform(vectors)[free])
    means = MiniBatchKMeans(count, random_state=seed, n_init=3).fit(unit, sample_weight=weight[free])
    mass = np.bincount(means.labels_, weights=weight[free], minlength=count)
    nearness = unit @ means.cluster_centers_.T  # [free, count]
    chosen: list[int] = []
    for group in np.argsort(-mass, kind="stable"):
        best = int(nearness[:, group].argmax())
        nearness[best] = -np.inf  # so that a group which came out empty gives another cell
        chosen.append(int(free[best]))
    return chosen


def unsureness(probability: np.ndarray) -> np.ndarray:
    """1 - the lead of the first class over the second, of probabilities [N, K]: float [N] in [0, 1]."""
    two = np.partition(probability, -2, axis=1)[:, -2:]
    return np.asarray(1 - (two[:, 1] - two[:, 0]))
