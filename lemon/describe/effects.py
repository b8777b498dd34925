"""How much nuclei of a group differ from all others in a measure: Cliff's delta, over all and slide by slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from lemon.cells.morphometry import MEASURES, Measure

MIN_CELLS = 20
"""Cells of a group and of others that a slide must have to be asked for itself."""


@dataclass(frozen=True)
class Effect:
    """One measure of one group.

    Attributes:
        delta: Cliff's delta in [-1, 1]: the share of pairs (a cell of the group, another cell) in which the group's
            value is higher, less that in which it is lower. 0.11, 0.28, 0.43 are called small, medium, large (Vargha
            and Delaney 2000).
        median, others: of the group and of all other cells, in the measure's unit.
        n: cells of the group with a value.
        n_slides, n_agree: slides with enough cells of both, and those of them where the sign is the same.
    """

    measure: Measure
    delta: float
    median: float
    others: float
    n: int
    n_slides: int
    n_agree: int


def cliffs_delta(values: np.ndarray, inside: np.ndarray) -> float:
    """Cliff's delta (1993) of values [N] of a group, bool [N], against the rest, by ranks; NaN where one is empty."""
    here, there = int(inside.sum()), int((~inside).sum())
    if not here or not there:
        return float("nan")
    u = rankdata(values)[inside].sum() - here * (here + 1) / 2  # Mann and Whitney's
    return float(2 * u / (here * there) - 1)


def effects_of(columns: dict[str, np.ndarray], inside: np.ndarray, slides: np.ndarray) -> list[Effect]:
    """The effects of a group, the largest first; measures without values are left out.

    Args:
        columns: values [N] of measures by column; NaN is no value.
        inside: bool [N], the group.
        slides: the slide of each cell [N].
    """
    found = []
    for measure in MEASURES:
        values = columns.get(measure.column, np.full(len(inside), np.nan))
        known = np.isfinite(values)
        delta = cliffs_delta(values[known], inside[known])
        if np.isnan(delta):
            continue
        each = _by_slide(values[known], inside[known], slides[known])
        found.append(
            Effect(
                measure=measure,
                delta=delta,
                median=float(np.median(values[known & inside])),
                others=float(np.median(values[known & ~inside])),
                n=int((known & inside).sum()),
                n_slides=len(each),
                n_agree=int(np.sum(np.sign(each) == np.sign(delta))),
            )
        )
    return sorted(found, key=lambda effect: -abs(effect.delta))


def _by_slide(values: np.ndarray, inside: np.ndarray, slides: np.ndarray) -> list[float]:
    deltas = []
    for slide in np.unique(slides):
        here = slides == slide
        if min(np.sum(inside[here]), np.sum(~inside[here])) >= MIN_CELLS:
            deltas.append(cliffs_delta(values[here], inside[here]))
    return deltas


def typical(vectors: np.ndarray, inside: np.ndarray, count: int) -> np.ndarray:
    """The cells of a group whose vectors [N, D] point most nearly where its mean does: indices, the nearest first."""
    members = np.flatnonzero(inside)
    directions = vectors[members].astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True).clip(1e-12)
    likeness = directions @ directions.mean(axis=0)
    nearest: np.ndarray = members[np.argsort(-likeness, kind="stable")[:count]]
    return nearest
