"""Does an embedding hold the class of a nucleus, or the hospital (scanner) that its slide comes from?

The paper leaves this open. Measures made for patches are ported to nuclei; a *batch* is a hospital or a scanner:

- robustness index (PathoROB, arXiv 2507.17845): among the k nearest neighbours of a nucleus, those of its class from
  another batch against those of another class from its batch;
- CRoMa (arXiv 2607.25497): how much nearer the first kind is than the second, of each nucleus; the median, and the mean
  of the worst tenth;
- batch accuracy: how well a linear probe tells the batch of nuclei on slides that it has not seen;
- average performance drop and calibration shift: ``lemon.probe.unseen``; nIPD: ``lemon.probe.shortcut``.

The package ``croma`` computes the index, CRoMa and nIPD as well, and tests compare with it. It is not used: it refuses
a set in which a single nucleus lacks neighbours of one kind, its sweep takes slides of one class and of equal numbers
of rows, where a slide here holds nuclei of all classes, and it looks at neighbours one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.preprocessing import StandardScaler

from lemon.probe.folds import N_FOLDS
from lemon.probe.linear import fit_classifier, fit_logistic
from lemon.probe.metrics import DRAWS, Interval, balanced_accuracy_of, cluster_draws
from lemon.probe.nuclei import Nuclei, confusions, over_draws, resampled
from lemon.probe.shortcut import shortcut_loss
from lemon.probe.unseen import unseen_batches

NEIGHBOURS = 50
"""Of the robustness index: those that are counted."""

NEAREST = 5
"""Of CRoMa: how many of each kind are averaged, the number that its paper reports."""

TAIL = 0.1
"""The share of nuclei whose margins are the worst, as in the paper of CRoMa."""

MAX_A_PAIR = 200
"""Nuclei of one class and batch that are compared at most: classes and batches then weigh alike."""

_CHUNK = 512  # nuclei whose distances to all others are in memory at once


@dataclass(frozen=True)
class Robustness:
    """Measures by name, each with its interval over slides (NaN where it has none), and what they are over.

    ``chance``: what a measure is of embeddings without any information, by the same names where it is known.
    """

    measures: dict[str, Interval]
    chance: dict[str, float]
    n: int
    n_batches: int


def robustness(nuclei: Nuclei, *, seed: int, draws: int = DRAWS) -> Robustness | None:
    """All measures; None where fewer than two batches hold two classes each on two slides or more.

    Args:
        nuclei: embedded, of known class, batch and slide.
        seed: of the sample, of splits and of draws.
        draws: of whole slides, for intervals.
    """
    chosen = balanced_sample(nuclei, seed=seed)
    if not len(chosen):
        return None
    nuclei = nuclei.take(chosen)
    n_batches = len(np.unique(nuclei.batch))
    measures = neighbour_measures(nuclei, seed=seed, draws=draws)
    measures["batch_accuracy"] = batch_accuracy(nuclei, seed=seed, draws=draws)
    measures |= unseen_batches(nuclei, seed=seed, draws=draws)
    measures["nipd"] = Interval(shortcut_loss(nuclei, seed=seed), np.nan, np.nan)
    chance = neighbour_chance(nuclei, seed=seed) | {"batch_accuracy": 1 / n_batches}
    return Robustness(measures, chance, n=len(chosen), n_batches=n_batches)


def balanced_sample(nuclei: Nuclei, *, seed: int, most: int = MAX_A_PAIR) -> np.ndarray:
    """Indices with the same number of nuclei in each pair of class and batch.

    Batches of a single slide, which cannot be told from its own look, and batches that lack a class of those that most
    batches hold are left out; then the smallest pair sets the number.
    """
    names, member = np.unique(nuclei.batch, return_inverse=True)
    counts = np.zeros((len(names), nuclei.labels.max() + 1), int)
    np.add.at(counts, (member, nuclei.labels), 1)
    classes = np.flatnonzero((counts > 0).mean(axis=0) > 0.5)
    enough = 5  # nuclei of a pair below which a batch tells nothing
    several = np.array([len(np.unique(nuclei.slide[member == number])) > 1 for number in range(len(names))])
    batches = np.flatnonzero((counts[:, classes] >= enough).all(axis=1) & several)
    if len(classes) < 2 or len(batches) < 2:
        return np.empty(0, np.int64)
    n = min(most, int(counts[np.ix_(batches, classes)].min()))
    generator = np.random.default_rng(seed)
    pairs = [np.flatnonzero((member == b) & (nuclei.labels == k)) for b in batches for k in classes]
    return np.sort(np.concatenate([generator.choice(pair, n, replace=False) for pair in pairs]))


class Neighbourhoods(NamedTuple):
    """Of each nucleus: neighbours for and against the class, int [N] each, and CRoMa's margin, float [N]."""

    of_class: np.ndarray
    of_batch: np.ndarray
    margin: np.ndarray


def neighbourhoods(nuclei: Nuclei, *, k: int = NEIGHBOURS, nearest: int = NEAREST) -> Neighbourhoods:
    """What is near to each nucleus by cosine of standardised embeddings; its own slide is skipped.

    Neighbours *of its class* are of another batch, those *of its batch* of another class. With d the mean distance to
    the ``nearest`` of each kind, wherever they are, the margin is (d_batch - d_class) / (d_batch + d_class), in (-1, 1)
    and NaN where there are fewer of a kind, or all distances are 0 (arXiv 2607.25497).
    """
    values = StandardScaler().fit_transform(nuclei.embedding.astype(np.float64))
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    parts = []
    for rows in np.array_split(np.arange(len(values)), -(-len(values) // _CHUNK)):
        distance = np.maximum(1 - values[rows] @ values.T, 0)  # [n, N]
        distance[nuclei.slide[rows, None] == nuclei.slide] = np.inf
        same_class = nuclei.labels[rows, None] == nuclei.labels
        same_batch = nuclei.batch[rows, None] == nuclei.batch
        kinds = same_class & ~same_batch, ~same_class & same_batch
        near = np.argpartition(distance, min(k, len(values)) - 1, axis=1)[:, :k]
        near_is_other_slide = np.isfinite(np.take_along_axis(distance, near, axis=1))
        of_class, of_batch = (
            (np.take_along_axis(kind, near, axis=1) & near_is_other_slide).sum(axis=1) for kind in kinds
        )
        to_class, to_batch = (_mean_of_nearest(np.where(kind, distance, np.inf), nearest) for kind in kinds)
        total = to_batch + to_class
        margin = np.divide(to_batch - to_class, total, out=np.full(len(rows), np.nan), where=total > 0)
        parts.append(Neighbourhoods(of_class, of_batch, margin))
    return Neighbourhoods(*map(np.concatenate, zip(*parts, strict=True)))


def _mean_of_nearest(distance: np.ndarray, nearest: int) -> np.ndarray:
    """Mean of the least distances of each row of [n, N]; NaN where a row has fewer that are finite."""
    nearest = min(nearest, distance.shape[1])
    mean = np.partition(distance, nearest - 1, axis=1)[:, :nearest].mean(axis=1)
    return np.where(np.isfinite(mean), mean, np.nan)


def neighbour_measures(nuclei: Nuclei, *, seed: int, draws: int) -> dict[str, Interval]:
    """The index in [0, 1], CRoMa in (-1, 1), and CRoMa's mean over its worst tenth; more is better.

    Intervals are over slides whose nuclei keep their neighbours.
    """
    found = neighbourhoods(nuclei)
    counts = resampled(np.stack(found[:2], axis=1), nuclei.slide, seed=seed, draws=draws)
    total = counts.sum(axis=1)
    index = np.divide(counts[:, 0], total, out=np.full(len(total), np.nan), where=total > 0)
    names, member = np.unique(nuclei.slide, return_inverse=True)
    scored = np.isfinite(found.margin)
    margin, owner = found.margin[scored], member[scored]
    drawn = [margin, *(np.repeat(margin, times[owner]) for times in cluster_draws(len(names), seed=seed, draws=draws))]
    return {
        "robustness_index": over_draws(index),
        "croma": over_draws(np.array([np.median(each) if len(each) else np.nan for each in drawn])),
        "croma_tail": over_draws(np.array([_worst(each) for each in drawn])),
    }


def neighbour_chance(nuclei: Nuclei, *, seed: int) -> dict[str, float]:
    """The same of these embeddings dealt to the nuclei at random: 0.5 and 0 for two batches of many slides, else more.

    With more batches than classes there are more nuclei of the class elsewhere than others in the batch.
    """
    order = np.random.default_rng(seed).permutation(len(nuclei.labels))
    dealt = Nuclei(nuclei.embedding[order], nuclei.labels, nuclei.batch, nuclei.slide)
    return {name: found.value for name, found in neighbour_measures(dealt, seed=seed, draws=1).items()}


def _worst(margin: np.ndarray) -> float:
    """Mean of the margins up to the quantile ``TAIL``."""
    return float(margin[margin <= np.quantile(margin, TAIL)].mean()) if len(margin) else float("nan")


def batch_accuracy(nuclei: Nuclei, *, seed: int, draws: int) -> Interval:
    """Balanced accuracy of a linear probe that tells the batch, on slides that it has not seen; chance is 1 / batches.

    Classes weigh alike in every batch, so that their mixture does not tell it. C is chosen on the first fold alone.
    """
    names, target = np.unique(nuclei.batch, return_inverse=True)
    fold, predicted, c = _dealt_folds(nuclei, seed=seed), np.empty_like(target), 0.0
    for number in range(fold.max() + 1):
        train, test = nuclei.take(fold != number), fold == number
        c = c or fit_classifier(train.embedding, target[~test], groups=train.slide, seed=seed).chosen
        predicted[test] = fit_logistic(train.embedding, target[~test], c=c).predict(nuclei.embedding[test])
    hits = confusions(target, predicted, classes=len(names))
    return over_draws(balanced_accuracy_of(resampled(hits, nuclei.slide, seed=seed, draws=draws)))


def _dealt_folds(nuclei: Nuclei, *, seed: int) -> np.ndarray:
    """The fold of each nucleus, int [N]: a batch's slides are dealt in turn, so that all batches are in all folds."""
    generator, fold = np.random.default_rng(seed), np.empty(len(nuclei.slide), np.int64)
    slides = [generator.permutation(np.unique(nuclei.slide[nuclei.batch == name])) for name in np.unique(nuclei.batch)]
    n_folds = min(N_FOLDS, *map(len, slides))
    for of_batch in slides:
        for number, name in enumerate(of_batch):
            fold[nuclei.slide == name] = number % n_folds
    return fold
