"""nIPD: what a probe loses when class and hospital (scanner) go together in its training part, as a shortcut.

A probe is trained on parts of one size in which the association of class and batch rises from none to full (Cramér's V
from 0 to 1), and scored on other slides where there is none. The loss of accuracy above chance, integrated over V, is
the normalized integrated performance degradation of arXiv 2607.25497.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lemon.probe.linear import fit_classifier, fit_logistic
from lemon.probe.nuclei import Nuclei

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Cramér's V of class and batch in training parts."""

REPEATS = 10
"""Splits of slides, each with another class for each batch."""

LEAST = 10
"""Nuclei of a batch in a training part below which a split says nothing."""


class Split(NamedTuple):
    """Rows by which a repeat trains at each strength, int [n] each, and those that it is scored on."""

    training: tuple[np.ndarray, ...]
    test: np.ndarray


def shortcut_loss(nuclei: Nuclei, *, seed: int) -> float:
    """nIPD: 0 where the shortcut costs nothing, -0.5 for a straight fall to chance.

    NaN where there is nothing to lose: without association the probe is not above chance by two standard errors.

    DEVIATION: C is chosen once, where there is no association, and not anew in each training part, whose own validation
    part would follow the shortcut too.
    """
    splits, c = list(biased_splits(nuclei, seed=seed)), 0.0
    accuracies = np.empty((len(STRENGTHS), len(splits)))
    for column, split in enumerate(splits):
        for row, training in enumerate(split.training):
            part, test = nuclei.take(training), nuclei.take(split.test)
            c = c or _choose_c(part, seed=seed)
            hits = fit_logistic(part.embedding, part.labels, c=c).predict(test.embedding) == test.labels
            accuracies[row, column] = hits.mean()  # classes are even in the test part: the balanced accuracy
    if len(splits) < 2:
        return float("nan")
    chance, error = 1 / _n_classes(nuclei), accuracies[0].std(ddof=1) / len(splits) ** 0.5
    return (
        degradation(accuracies, STRENGTHS, chance=chance) if accuracies[0].mean() > chance + 2 * error else float("nan")
    )


def degradation(accuracies: np.ndarray, strengths: tuple[float, ...], *, chance: float) -> float:
    """Area under (accuracy(V) - accuracy(0)) / (accuracy(0) - chance) by trapezoids.

    Args:
        accuracies: balanced accuracy float [V, repeats]; repeats are averaged first.
        strengths: Cramér's V of each row, from 0 to 1.
        chance: accuracy of guessing.

    Returns:
        NaN where accuracy(0) is not above chance. Source: arXiv 2607.25497.
    """
    mean = accuracies.mean(axis=1)
    skill = mean[0] - chance
    return float(np.trapezoid((mean - mean[0]) / skill, strengths)) if skill > 0 else float("nan")


def biased_splits(nuclei: Nuclei, *, seed: int) -> Iterator[Split]:
    """Repeats: classes are dealt to batches, half of each batch's slides trains, and its other half is scored on.

    With K classes and a multiple of K batches, a batch holds the share V + (1 - V) / K of its own class and (1 - V) / K
    of each other, which makes Cramér's V of class and batch V. What is too few in a repeat is left out.
    """
    generator = np.random.default_rng(seed)
    all_classes, all_batches = np.unique(nuclei.labels), np.unique(nuclei.batch)
    n_classes = _n_classes(nuclei)
    n_batches = n_classes * (len(all_batches) // n_classes)
    for _ in range(REPEATS):
        classes = generator.choice(all_classes, n_classes, replace=False)
        batches = generator.choice(all_batches, n_batches, replace=False)
        training = _training_half(nuclei, batches, generator)
        pairs = [
            [generator.permutation(np.flatnonzero((nuclei.batch == b) & (nuclei.labels == k))) for k in classes]
            for b in batches
        ]
        trains = [[pair[training[pair]] for pair in of_batch] for of_batch in pairs]
        tests = [pair[~training[pair]] for of_batch in pairs for pair in of_batch]
        own = [number % n_classes for number in range(n_batches)]
        size = min(
            min(len(of_batch[k]), n_classes * min(map(len, of_batch))) for k, of_batch in zip(own, trains, strict=True)
        )
        n_test = min(map(len, tests))
        if size >= LEAST and n_test:
            parts = tuple(_training_part(trains, own, size=size, strength=strength) for strength in STRENGTHS)
            yield Split(parts, np.concatenate([test[:n_test] for test in tests]))


def _training_half(nuclei: Nuclei, batches: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Which nuclei are of the half of their batch's slides that trains: bool [N]."""
    chosen = []
    for batch in batches:
        slides = np.unique(nuclei.slide[nuclei.batch == batch])
        chosen.append(generator.choice(slides, (len(slides) + 1) // 2, replace=False))
    return np.isin(nuclei.slide, np.concatenate(chosen))


def _training_part(trains: list[list[np.ndarray]], own: list[int], *, size: int, strength: float) -> np.ndarray:
    """The first rows of each pair of batch and class, as many as its share of ``size`` at a strength."""
    n_classes = len(trains[0])
    rows = []
    for home, of_batch in zip(own, trains, strict=True):
        for number, pair in enumerate(of_batch):
            share = (1 - strength) / n_classes + (strength if number == home else 0)
            rows.append(pair[: round(size * share)])
    return np.concatenate(rows)


def _choose_c(part: Nuclei, *, seed: int) -> float:
    return fit_classifier(part.embedding, part.labels, groups=part.slide, seed=seed, criterion="log_loss").chosen


def _n_classes(nuclei: Nuclei) -> int:
    """Classes of a repeat: as many as there are batches to deal them to."""
    return min(len(np.unique(nuclei.labels)), len(np.unique(nuclei.batch)))
