"""Where classes lie: cells a mm2 of each, and what is around cells of each."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from lemon.schema import CountRow, NeighbourhoodRow

SQUARE_UM = 100.0
"""Side of the squares that tissue is measured by: larger than gaps between nuclei, smaller than the tissue's."""

_CHUNK = 100_000


def tissue_mm2(place_um: np.ndarray) -> float:
    """Area of the squares of 100 um that hold one of the nuclei [N, 2], in mm2."""
    squares = np.unique(np.floor(place_um / SQUARE_UM).astype(np.int64), axis=0)
    return len(squares) * (SQUARE_UM / 1000) ** 2


def count_rows(slide_id: str, codes: np.ndarray, names: tuple[str, ...], *, area_mm2: float | None) -> list[CountRow]:
    """A row for each class: how many cells int [N] of codes are of it."""
    counts = np.bincount(codes, minlength=len(names)).tolist()
    return [
        CountRow(
            slide_id=slide_id,
            label=name,
            n_cells=count,
            share=count / max(1, len(codes)),
            area_mm2=area_mm2,
            per_mm2=count / area_mm2 if area_mm2 else None,
        )
        for name, count in zip(names, counts, strict=True)
    ]


def neighbour_counts(
    place_um: np.ndarray, codes: np.ndarray, *, n_classes: int, neighbours: int, radius_um: float
) -> np.ndarray:
    """Pairs [K, K]: how often a cell of the first class has one of the second among its nearest nuclei.

    Args:
        place_um: of nuclei, float [N, 2].
        codes: their classes, int [N].
        neighbours: the nearest so many are looked at.
        radius_um: those farther away are not.
    """
    pairs = np.zeros(n_classes * n_classes, np.int64)
    tree = cKDTree(place_um)
    for start in range(0, len(codes), _CHUNK):
        own = np.arange(start, min(start + _CHUNK, len(codes)))
        _, nearest = tree.query(place_um[own], k=neighbours + 1, distance_upper_bound=radius_um)
        # A nucleus is its own nearest, but not always the first where several lie at one place.
        valid = (nearest < len(codes)) & (nearest != own[:, None])
        first = np.broadcast_to(codes[own][:, None], nearest.shape)[valid]
        pairs += np.bincount(first * n_classes + codes[nearest[valid]], minlength=len(pairs))
    return pairs.reshape(n_classes, n_classes)


def neighbourhood_rows(
    slide_id: str, pairs: np.ndarray, codes: np.ndarray, names: tuple[str, ...]
) -> list[NeighbourhoodRow]:
    """A row for each pair of classes that are on the slide, of ``neighbour_counts`` [K, K]."""
    on_slide = np.bincount(codes, minlength=len(names)) / max(1, len(codes))
    rows = []
    for first in np.flatnonzero(pairs.sum(axis=1)):
        shares = pairs[first] / pairs[first].sum()
        rows += [
            NeighbourhoodRow(
                slide_id=slide_id,
                label=names[first],
                neighbour=names[second],
                n_neighbours=int(pairs[first, second]),
                share=float(shares[second]),
                ratio=float(shares[second] / on_slide[second]),
            )
            for second in np.flatnonzero(on_slide)
        ]
    return rows
