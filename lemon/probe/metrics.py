"""Scores of predictions, with intervals from a bootstrap that draws whole slides.

Nuclei of one slide resemble each other, so drawing nuclei one by one would make intervals far too narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from sklearn.metrics import f1_score, recall_score, roc_auc_score

DRAWS = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def classification_scores(truth: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    """Balanced accuracy, macro-F1 and macro AUROC (one against the rest).

    Args:
        truth: int [N], indices of classes.
        probability: float [N, K]; the prediction is the largest.

    Returns:
        By name; means are over the classes that occur in ``truth``; ``auroc`` is NaN where only one does.
    """
    predicted, present = probability.argmax(axis=1), np.unique(truth)
    areas = [roc_auc_score(truth == k, probability[:, k]) for k in present] if len(present) > 1 else [np.nan]
    return {
        "balanced_accuracy": float(recall_score(truth, predicted, labels=present, average="macro")),
        "macro_f1": float(f1_score(truth, predicted, labels=present, average="macro")),
        "auroc": float(np.mean(areas)),
    }


def pearson(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Pearson correlation of each column of two [N, G] arrays: float64 [G]; NaN where a column is constant."""
    a = truth - truth.mean(axis=0, dtype=np.float64)
    b = predicted - predicted.mean(axis=0, dtype=np.float64)
    norms = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), norms, out=np.full(a.shape[1], np.nan), where=norms > 0)


def mean_pearson(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of ``pearson`` over the columns that have one; NaN where none has, as in a single row."""
    correlations = pearson(truth, predicted)
    correlations = correlations[np.isfinite(correlations)]
    return float(correlations.mean()) if len(correlations) else float("nan")


def confusion_by_cluster(truth: np.ndarray, predicted: np.ndarray, cluster: np.ndarray, *, classes: int) -> np.ndarray:
    """Counts [M, K, K] (true class, predicted class) of each of M clusters, in the order of their names."""
    names, member = np.unique(cluster, return_inverse=True)
    flat = (member * classes + truth) * classes + predicted
    return np.bincount(flat, minlength=len(names) * classes**2).reshape(len(names), classes, classes)


def cluster_draws(n_clusters: int, *, seed: int, draws: int = DRAWS) -> np.ndarray:
    """How often each cluster is drawn: int [draws, M]; the same for every encoder, so that differences are paired."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)


def balanced_accuracy_of(confusion: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that occur, of confusion counts [..., K, K]."""
    truth = confusion.sum(axis=-1)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    recall = np.divide(hits, truth, out=np.full(truth.shape, np.nan), where=truth > 0)
    return np.nanmean(recall, axis=-1)


def macro_f1_of(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that occur, of confusion counts [..., K, K]."""
    truth, claimed = confusion.sum(axis=-1), confusion.sum(axis=-2)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    f1 = np.divide(2 * hits, truth + claimed, out=np.full(truth.shape, np.nan), where=truth > 0)
    return np.nanmean(f1, axis=-1)


CONFUSION_METRICS = {"balanced_accuracy": balanced_accuracy_of, "macro_f1": macro_f1_of}


def interval(confusion: np.ndarray, draws: np.ndarray, *, metric: str) -> Interval:
    """A metric over all clusters [M, K, K] with its bootstrap interval."""
    of = CONFUSION_METRICS[metric]
    return _interval(float(of(confusion.sum(axis=0))), of(_drawn(confusion, draws)))


def paired_difference(first: np.ndarray, second: np.ndarray, draws: np.ndarray, *, metric: str) -> Interval:
    """``first`` minus ``second`` on the same nuclei, with the interval of the difference over the same draws."""
    of = CONFUSION_METRICS[metric]
    value = float(of(first.sum(axis=0)) - of(second.sum(axis=0)))
    return _interval(value, of(_drawn(first, draws)) - of(_drawn(second, draws)))


def mean_interval(values: np.ndarray, draws: np.ndarray) -> Interval:
    """Mean of one value a cluster [M] (a correlation within each slide, say), with its bootstrap interval."""
    return _interval(float(values.mean()), draws @ values / draws.sum(axis=1))


def _drawn(confusion: np.ndarray, draws: np.ndarray) -> np.ndarray:
    return np.tensordot(draws, confusion, axes=(1, 0))  # [draws, K, K]


def _interval(value: float, samples: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(samples, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
