"""A calibrated linear head on few labels: how sure it is, how good it is, and what it does not know."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline

from lemon.embed.stream import directions
from lemon.probe import linear, metrics
from lemon.probe.folds import grouped_folds

C_GRID = tuple(10.0 ** np.arange(-4, 1.1))
FEW_C = 0.01
"""Where a class has fewer labels than there are inner folds, C cannot be sought."""

N_FOLDS = 5
MAX_COMPARED = 5000
"""Labelled cells that a cell's distance is measured to, at most."""

_LEAST = 1e-7  # probability whose logarithm is taken


@dataclass(frozen=True)
class Head:
    """Classes of vectors by logistic regression, whose probabilities have been calibrated.

    ``compared`` float32 [M, D] are directions of labelled cells; farther than ``limit`` (1 - cosine) from all of them a
    cell is unknown (None: none is). A temperature above 1 makes probabilities less sure (Guo et al., On calibration of
    modern neural networks, ICML 2017).
    """

    model: Pipeline
    n_classes: int
    temperature: float
    compared: np.ndarray
    limit: float | None

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [N, K] of vectors float32 [N, D]."""
        raw = linear.class_probabilities(self.model, vectors, classes=self.n_classes)
        return cooled(raw, self.temperature)

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """1 - cosine to the nearest labelled cell: float32 [N]."""
        return np.asarray(1 - (directions(vectors) @ self.compared.T).max(axis=1), np.float32).clip(0)


class HeldOut(NamedTuple):
    """Labelled cells as heads saw them that were fitted without them, or without their slides.

    ``rows`` int [n] are those that could be held out; ``probability`` [n, K]; ``by_slide`` says what was held out.
    """

    rows: np.ndarray
    probability: np.ndarray
    by_slide: bool


def fit_head(
    vectors: np.ndarray, codes: np.ndarray, *, groups: np.ndarray, n_classes: int, seed: int, unknown: float | None
) -> tuple[Head, HeldOut]:
    """Fit on vectors float32 [N, D] with classes int [N]; also what cross-validation says of it.

    Args:
        groups: names [N] of slides; with two or more, whole slides are held out.
        seed: of the folds.
        unknown: share of labelled cells whose nearest other one is nearer than the limit.
    """
    held_out = cross_validate(vectors, codes, groups=groups, n_classes=n_classes, seed=seed)
    model = fit_model(vectors, codes, groups=groups, seed=seed)
    temperature = temperature_of(codes[held_out.rows], held_out.probability)
    chosen = np.random.default_rng(seed).permutation(len(vectors))[:MAX_COMPARED]
    compared = directions(vectors[chosen])
    limit = None if unknown is None else float(np.quantile(nearest_others(compared), unknown))
    return Head(model, n_classes, temperature, compared, limit), held_out


def cross_validate(vectors: np.ndarray, codes: np.ndarray, *, groups: np.ndarray, n_classes: int, seed: int) -> HeldOut:
    """Probabilities of labelled cells by heads that were fitted without their slides, or of one slide without them."""
    by_slide = len(np.unique(groups)) > 1
    rows, outputs = [np.zeros(0, np.int64)], [np.zeros((0, n_classes), np.float32)]
    for train, test in _folds(codes, groups if by_slide else None, seed=seed):
        if len(np.unique(codes[train])) > 1:
            model = fit_model(vectors[train], codes[train], groups=groups[train], seed=seed)
            rows.append(test)
            outputs.append(linear.class_probabilities(model, vectors[test], classes=n_classes))
    return HeldOut(np.concatenate(rows), np.concatenate(outputs), by_slide)


def score_of(held_out: HeldOut, codes: np.ndarray, groups: np.ndarray, *, seed: int) -> metrics.Interval:
    """Balanced accuracy over all that was held out, with an interval over slides, or over cells of one slide."""
    truth = codes[held_out.rows]
    cluster = groups[held_out.rows] if held_out.by_slide else np.arange(len(truth))
    together = np.zeros(len(truth), int)
    counts = metrics.counts_of(
        "balanced_accuracy", truth[:, None], held_out.probability, fold=together, cluster=cluster
    )
    return metrics.bootstrap(counts, seed=seed).interval()


def temperature_of(truth: np.ndarray, probability: np.ndarray) -> float:
    """The temperature by which probabilities [n, K] have the least log loss; 1 where there is nothing to tell."""
    if len(truth) < 2:
        return 1.0

    def loss(logarithm: float) -> float:
        sure = cooled(probability, float(np.exp(logarithm)))[np.arange(len(truth)), truth]
        return float(-np.log(np.maximum(sure, _LEAST)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-1.5, 1.5), method="bounded").x))


def cooled(probability: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities float32 [n, K] at a temperature."""
    logits = np.log(np.maximum(probability, _LEAST)) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def nearest_others(unit: np.ndarray) -> np.ndarray:
    """1 - cosine of each direction [M, D] to the nearest of the others: float32 [M]."""
    nearest = np.empty(len(unit), np.float32)
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        similarity[np.arange(len(similarity)), start + np.arange(len(similarity))] = -1
        nearest[start : start + 1024] = 1 - similarity.max(axis=1)
    return nearest.clip(0)


def fit_model(vectors: np.ndarray, codes: np.ndarray, *, groups: np.ndarray, seed: int) -> Pipeline:
    """Logistic regression of classes int [N], two at least, whose C has the best inner log loss."""
    counts = np.bincount(codes)
    if counts[counts > 0].min() < linear.INNER_FOLDS:
        return linear.fit_logistic(vectors, codes, c=FEW_C)
    fitted = linear.fit_classifier(vectors, codes, groups=groups, seed=seed, criterion="log_loss", grid=C_GRID)
    return fitted.model


def _folds(codes: np.ndarray, groups: np.ndarray | None, *, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    n_folds = min(N_FOLDS, int(np.bincount(codes).max()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        if groups is not None:
            return [(fold.train, fold.test) for fold in grouped_folds(groups, labels=codes.astype(str), seed=seed)]
        if n_folds < 2:  # a cell of each class: nothing is left to learn it from
            return []
        return list(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(codes, codes))
