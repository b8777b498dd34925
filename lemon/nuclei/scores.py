"""How well found nuclei agree with drawn ones: by centroids, and by instance maps (int [H, W], 0 is background)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from scipy.spatial import cKDTree

from lemon.nuclei.instances import Nucleus

REACH_PX = 12.0
"""Centroids this far apart may still be of the same nucleus: 3 um at 40x."""


def scores(found: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """All figures of one image.

    ``f1``, ``precision`` and ``recall`` by centroids; ``f1_iou`` and ``pq`` (panoptic quality) of instances that
    overlap by more than half (IoU); ``aji`` (aggregated Jaccard index); ``dice`` of the pixels of all nuclei; and the
    counts ``found`` and ``drawn``.
    """
    overlap = _overlaps(found, drawn)
    n_found, n_drawn = overlap.n_found, overlap.n_drawn
    matched = overlap.iou > 0.5
    hits, both = int(matched.sum()), max(n_found + n_drawn, 1)
    return {
        **detection(centroids(found), centroids(drawn)),
        "f1_iou": 2 * hits / both,
        "pq": 2 * float(overlap.iou[matched].sum()) / both,
        "aji": overlap.aji(),
        "dice": dice(found, drawn),
        "found": n_found,
        "drawn": n_drawn,
    }


def centroids(labels: np.ndarray) -> np.ndarray:
    """Centroids [N, 2] (x, y) of the labels above 0."""
    flat = labels.ravel()
    y, x = np.indices(labels.shape)
    count = np.bincount(flat)
    ids = np.flatnonzero(count)
    ids = ids[ids > 0]
    return np.stack([np.bincount(flat, axis.ravel())[ids] / count[ids] for axis in (x, y)], axis=1)


def n_matched(found: np.ndarray, drawn: np.ndarray, *, reach_px: float = REACH_PX) -> int:
    """Pairs of points [N, 2] and [M, 2] made one to one, nearest pairs first, at most ``reach_px`` apart."""
    if len(found) == 0 or len(drawn) == 0:
        return 0
    near = cKDTree(found).sparse_distance_matrix(cKDTree(drawn), reach_px, output_type="coo_matrix")
    used_found: set[int] = set()
    used_drawn: set[int] = set()
    for pair in np.argsort(near.data, kind="stable"):
        a, b = int(near.row[pair]), int(near.col[pair])
        if a not in used_found and b not in used_drawn:
            used_found.add(a)
            used_drawn.add(b)
    return len(used_found)


def detection(found: np.ndarray, drawn: np.ndarray) -> dict[str, float]:
    """F1, precision and recall of centroids [N, 2]; an image without nuclei that are found has F1 0."""
    matched = n_matched(found, drawn)
    return {
        "f1": 2 * matched / max(len(found) + len(drawn), 1),
        "precision": matched / max(len(found), 1),
        "recall": matched / max(len(drawn), 1),
    }


def dice(found: np.ndarray, drawn: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of the pixels that belong to any nucleus."""
    a, b = found > 0, drawn > 0
    both = float((a & b).sum())
    return 2 * both / max(float(a.sum() + b.sum()), 1.0)


class _Overlaps:
    """Pairs of a found and a drawn nucleus that share pixels."""

    def __init__(self, found: np.ndarray, drawn: np.ndarray) -> None:
        self._area_found, self._area_drawn = np.bincount(found.ravel()), np.bincount(drawn.ravel())
        self.n_found, self.n_drawn = (int(np.count_nonzero(a[1:])) for a in (self._area_found, self._area_drawn))
        together = (found > 0) & (drawn > 0)
        pairs, shared = np.unique(np.stack((found[together], drawn[together])), axis=1, return_counts=True)
        self._found, self._drawn = pairs.astype(np.int64)
        self._shared = shared
        self._union = self._area_found[self._found] + self._area_drawn[self._drawn] - shared
        self.iou = shared / self._union

    def aji(self) -> float:
        """Aggregated Jaccard index (10.1109/TMI.2017.2677499): each drawn nucleus with the found one of highest IoU."""
        order = np.lexsort((-self.iou, self._drawn))
        best = order[np.unique(self._drawn[order], return_index=True)[1]] if len(order) else order
        used, met = np.unique(self._found[best]), self._drawn[best]
        union = self._union[best].sum() + self._area_found[1:].sum() - self._area_found[used].sum()
        union += self._area_drawn[1:].sum() - self._area_drawn[met].sum()
        return float(self._shared[best].sum() / union) if union else 0.0


def _overlaps(found: np.ndarray, drawn: np.ndarray) -> _Overlaps:
    if found.shape != drawn.shape:
        raise ValueError(f"found: got {found.shape}, expected the shape of drawn, {drawn.shape}")
    return _Overlaps(found, drawn)


def labels_of(nuclei: Sequence[Nucleus], *, shape: tuple[int, int]) -> np.ndarray:
    """Instance map int32 [H, W] of polygons, numbered from 1; where two overlap the later one is seen."""
    labels = np.zeros(shape, np.int32)
    for number, nucleus in enumerate(nuclei, start=1):
        cv2.fillPoly(labels, [np.round(nucleus.contour_px).astype(np.int32)], number)
    return labels
