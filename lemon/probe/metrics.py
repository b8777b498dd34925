"""Scores of predictions: means over folds, with intervals from a bootstrap that draws whole slides.

Nuclei of one slide resemble each other, so drawing nuclei one by one would make intervals far too narrow. A draw of
slides scores each fold on those of its slides that were drawn, as often as they were, and takes the mean: the interval
is that of the very mean over folds which tables show.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from sklearn.metrics import f1_score, recall_score, roc_auc_score

DRAWS = 1000
LEVEL = 0.95

_ROUNDING = 1e-12  # what is left of the variance of a constant column whose values lie within -1 and 1


class Interval(NamedTuple):
    """A value with the bounds of its 95 % interval; they are NaN where a single slide leaves nothing to draw."""

    value: float
    low: float
    high: float


class Counts(NamedTuple):
    """What a metric is computed from: ``sums`` [F, M, ...] by fold and cluster, and the metric of such sums."""

    sums: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


class Bootstrapped(NamedTuple):
    """A mean over folds, and the same of each draw of clusters [draws]."""

    mean: float
    draws: np.ndarray

    def interval(self) -> Interval:
        """The mean with its bounds."""
        return interval(self.mean, self.draws)

    def less(self, other: Bootstrapped) -> Interval:
        """The difference to another on the same nuclei, over the same draws."""
        return interval(self.mean - other.mean, self.draws - other.draws)


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
    together = np.zeros(len(truth), int)
    return correlations(moments(truth, predicted, together, together)[0, 0])


def mean_pearson(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean of ``pearson`` over the columns that have one; NaN where none has, as in a single row."""
    return float(_mean(pearson(truth, predicted)))


def counts_of(
    metric: str, truth: np.ndarray, predicted: np.ndarray, *, fold: np.ndarray, cluster: np.ndarray
) -> Counts:
    """What a metric needs of each fold and cluster.

    Args:
        metric: ``balanced_accuracy``, ``macro_f1``, ``recall_at_1`` or ``pearson``.
        truth: int [N, 1] of classes or of retrieval, float [N, G] of regression.
        predicted: float [N, K] of classes, whose largest is taken; [N, 1] of retrieval; [N, G] of regression.
        fold, cluster: names [N].
    """
    if metric == "pearson":
        return Counts(moments(truth, predicted, fold, cluster), mean_correlation_of)
    if metric == "recall_at_1":  # the recall of the one class "found"
        hits = (truth == predicted).all(axis=1).astype(int)
        return Counts(confusions(np.ones_like(hits), hits, fold, cluster, classes=2), balanced_accuracy_of)
    of = {"balanced_accuracy": balanced_accuracy_of, "macro_f1": macro_f1_of}[metric]
    guess = predicted.argmax(axis=1)
    return Counts(confusions(truth[:, 0].astype(int), guess, fold, cluster, classes=predicted.shape[1]), of)


def confusions(
    truth: np.ndarray, predicted: np.ndarray, fold: np.ndarray, cluster: np.ndarray, *, classes: int
) -> np.ndarray:
    """Counts [F, M, K, K] (true class, predicted class) of each fold and cluster, in the order of their names."""
    place, (n_folds, n_clusters) = _places(fold, cluster)
    flat = (place * classes + truth) * classes + predicted
    size = n_folds * n_clusters * classes**2
    return np.bincount(flat, minlength=size).reshape(n_folds, n_clusters, classes, classes)


def moments(truth: np.ndarray, predicted: np.ndarray, fold: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Sums [F, M, 6, G] of 1, t, p, t t, p p, t p over the nuclei of each fold and cluster, in the order of names.

    Columns are centred and scaled as a whole before, which changes no correlation and keeps digits.
    """
    place, (n_folds, n_clusters) = _places(fold, cluster)
    t, p = (_standardised(values) for values in (truth, predicted))
    sums = np.zeros((n_folds * n_clusters, 6, t.shape[1]))
    for row, values in enumerate((np.ones_like(t), t, p, t * t, p * p, t * p)):
        np.add.at(sums[:, row], place, values)
    return sums.reshape(n_folds, n_clusters, 6, t.shape[1])


def cluster_draws(n_clusters: int, *, seed: int, draws: int = DRAWS) -> np.ndarray:
    """How often each cluster is drawn: int [draws, M]; the same for every encoder, so that differences are paired."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=draws)


def balanced_accuracy_of(confusion: np.ndarray) -> np.ndarray:
    """Mean recall of the classes that occur, of confusion counts [..., K, K]; NaN where none does."""
    return _mean(_ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1)))


def macro_f1_of(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes that occur, of confusion counts [..., K, K]; NaN where none does."""
    truth, claimed = confusion.sum(axis=-1), confusion.sum(axis=-2)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return _mean(np.where(truth > 0, _ratio(2 * hits, truth + claimed), np.nan))


def correlations(sums: np.ndarray) -> np.ndarray:
    """Pearson correlations [..., G] of sums [..., 6, G] as of ``moments``; NaN where a column is constant."""
    n, t, p, tt, pp, tp = np.moveaxis(sums, -2, 0)
    variances = [np.where(each > _ROUNDING * n * n, each, 0) for each in (n * tt - t * t, n * pp - p * p)]
    return _ratio(n * tp - t * p, np.sqrt(variances[0] * variances[1]))


def mean_correlation_of(sums: np.ndarray) -> np.ndarray:
    """Mean of ``correlations`` over the columns that have one [...]."""
    return _mean(correlations(sums))


def bootstrap(counts: Counts, *, seed: int, draws: int = DRAWS) -> Bootstrapped:
    """Mean over folds, and over draws of whole clusters; a fold none of whose clusters is drawn does not count."""
    sums = counts.sums.astype(np.float64)
    n_clusters = sums.shape[1]
    mean = float(_mean(counts.score(sums.sum(axis=1))))
    if n_clusters < 2:
        return Bootstrapped(mean, np.full(draws, np.nan))
    drawn = np.tensordot(cluster_draws(n_clusters, seed=seed, draws=draws), sums, axes=(1, 1))  # [draws, F, ...]
    return Bootstrapped(mean, _mean(counts.score(drawn)))


def _places(fold: np.ndarray, cluster: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Index of each nucleus' fold and cluster in [F, M] laid flat, int [N], and (F, M)."""
    folds, row = np.unique(fold, return_inverse=True)
    clusters, column = np.unique(cluster, return_inverse=True)
    return row * len(clusters) + column, (len(folds), len(clusters))


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    return centred / (np.abs(centred).max(axis=0, initial=0) + np.finfo(float).tiny)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole; NaN where whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is a number; NaN where nothing is."""
    return _ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1))


def interval(value: float, samples: np.ndarray) -> Interval:
    """A value with the middle 95 % of its samples over draws; a draw in which it is undefined does not count."""
    samples = samples[np.isfinite(samples)]
    if not len(samples):
        return Interval(value, np.nan, np.nan)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(value, float(low), float(high))
