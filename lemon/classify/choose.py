"""Which cells to label next: uncertain ones, different from each other and from those that are labelled.

The pool is clustered into as many groups as there will be labels, each cell weighed by how unsure the head is of it,
and from the weightiest groups without a label the most typical cell is taken. With no labels yet it is coverage alone
(Hacohen et al., Active learning on a budget, ICML 2022: few labels had better be typical); as the head becomes sure of
most cells the groups gather where it is not (Zhdanov, Diverse mini-batch active learning, 2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import StandardScaler

from lemon.embed.stream import directions

BATCH = 2048  # of k-means
_LEAST_WEIGHT = 0.02


def choose_next(
    vectors: np.ndarray, labelled: Sequence[int], probability: np.ndarray | None, *, count: int, seed: int
) -> list[int]:
    """Rows to label next, ``count`` or all that are left, the most wanted first.

    Args:
        vectors: float32 [N, D] of the pool, labelled cells among them.
        labelled: rows that are labelled.
        probability: of classes [N, K] by the head so far; None: there is none.
        seed: of the clusters.
    """
    free = np.ones(len(vectors), bool)
    free[list(labelled)] = False
    count = min(count, int(free.sum()))
    if not count:
        return []
    unit = directions(StandardScaler().fit_transform(vectors))
    weight = np.ones(len(unit)) if probability is None else np.maximum(unsureness(probability), _LEAST_WEIGHT)
    n_clusters = min(len(labelled) + count, len(unit))
    means = MiniBatchKMeans(n_clusters, random_state=seed, n_init=1, batch_size=BATCH)
    group = means.fit_predict(unit, sample_weight=weight)
    mass = np.bincount(group, weights=weight, minlength=n_clusters)
    mass[group[list(labelled)]] *= 1e-6  # after all without a label
    typical = (unit * means.cluster_centers_[group]).sum(axis=1)
    chosen: list[int] = []
    while len(chosen) < count:  # once, or again where groups with labels must give some too
        for each in np.argsort(-mass):
            rows = np.flatnonzero((group == each) & free)
            if len(rows) and len(chosen) < count:
                chosen.append(int(rows[typical[rows].argmax()]))
                free[chosen[-1]] = False
    return chosen


def unsureness(probability: np.ndarray) -> np.ndarray:
    """1 - the lead of the first class over the second, of probabilities [N, K]: float [N] in [0, 1]."""
    two = np.partition(probability, -2, axis=1)[:, -2:]
    return np.asarray(1 - (two[:, 1] - two[:, 0]))
