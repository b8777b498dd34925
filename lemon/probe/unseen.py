"""What a probe loses on hospitals or scanners that it has not seen: accuracy, and the truth of its confidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lemon.probe.linear import class_probabilities, fit_classifier
from lemon.probe.metrics import (
    Interval,
    balanced_accuracy_of,
    cluster_draws,
    confusion_by_cluster,
    drawn_sums,
    percentile_interval,
)
from lemon.probe.nuclei import Nuclei

BINS = 15
"""Of confidence, as in Guo et al. 2017."""


class Scored(NamedTuple):
    """Nuclei on which a probe was scored: classes int [n], probabilities [n, K], slides str [n]."""

    truth: np.ndarray
    probability: np.ndarray
    slide: np.ndarray

    def take(self, rows: np.ndarray) -> Scored:
        """Those of the given indices."""
        return Scored(*(column[rows] for column in self))


def unseen_batches(nuclei: Nuclei, *, seed: int, draws: int) -> dict[str, Interval]:
    """Means over batches, each of which is left out in turn; intervals draw the slides that were scored.

    ``performance_drop``: 1 - (balanced accuracy on the batch left out / on unseen slides of the others), after PathoROB
    (arXiv 2507.17845). ``calibration_shift``: expected calibration error on the batch left out less that on unseen
    slides of the others, ``ece_unseen`` - ``ece_seen``, each over as many nuclei, since the error grows as they get
    fewer.
    """
    drops, errors = [], []  # a value and its draws, [1 + draws]; errors [2, 1 + draws]: seen, unseen
    generator = np.random.default_rng(seed)
    for sides in leave_each_batch_out(nuclei, seed=seed):
        seen, unseen = (_with_draws(_confusion(side), seed=seed, draws=draws) for side in sides)
        drops.append(1 - balanced_accuracy_of(unseen) / balanced_accuracy_of(seen))
        n = min(len(side.truth) for side in sides)
        alike = [side.take(generator.choice(len(side.truth), n, replace=False)) for side in sides]
        errors.append([calibration_error(_with_draws(confidence_bins(side), seed=seed, draws=draws)) for side in alike])
    if not drops:
        return {}
    seen, unseen = np.mean(errors, axis=0)
    values = {"performance_drop": np.mean(drops, axis=0), "ece_seen": seen, "ece_unseen": unseen}
    values["calibration_shift"] = unseen - seen
    return {name: percentile_interval(float(each[0]), each[1:]) for name, each in values.items()}


def leave_each_batch_out(nuclei: Nuclei, *, seed: int) -> Iterator[tuple[Scored, Scored]]:
    """For each batch: a probe of half of the others' slides, scored on their other half and on the batch left out."""
    generator, classes = np.random.default_rng(seed), int(nuclei.labels.max()) + 1
    for left_out in np.unique(nuclei.batch):
        unknown = nuclei.batch == left_out
        slides = np.unique(nuclei.slide[~unknown])
        chosen = generator.choice(slides, (len(slides) + 1) // 2, replace=False)
        training = np.isin(nuclei.slide, chosen) & ~unknown
        known = ~unknown & ~training
        if not known.any() or len(np.unique(nuclei.labels[training])) < 2:
            continue
        part = nuclei.take(training)
        model = fit_classifier(part.embedding, part.labels, groups=part.slide, seed=seed).model
        seen, unseen = (
            Scored(side.labels, class_probabilities(model, side.embedding, classes=classes), side.slide)
            for side in (nuclei.take(known), nuclei.take(unknown))
        )
        yield seen, unseen


def confidence_bins(scored: Scored) -> np.ndarray:
    """Nuclei, confidences and hits, summed: [M, bins, 3] of M slides; confidence is that of the likeliest class."""
    names, member = np.unique(scored.slide, return_inverse=True)
    confidence = scored.probability.max(axis=1)
    hit = scored.probability.argmax(axis=1) == scored.truth
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    sums = np.zeros((len(names), BINS, 3))
    np.add.at(sums, (member, bins), np.stack([np.ones_like(confidence), confidence, hit], axis=1))
    return sums


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error of ``confidence_bins`` that are summed over slides: [..., bins, 3] gives [...].

    |mean confidence - share of hits|, averaged over bins by their nuclei. Source: Guo et al., On Calibration of Modern
    Neural Networks (arXiv 1706.04599).
    """
    count, confidence, hits = np.moveaxis(sums, -1, 0)
    return np.asarray(np.abs(confidence - hits).sum(axis=-1) / count.sum(axis=-1))


def _confusion(scored: Scored) -> np.ndarray:
    predicted = scored.probability.argmax(axis=1)
    return confusion_by_cluster(scored.truth, predicted, scored.slide, classes=scored.probability.shape[1])


def _with_draws(counts: np.ndarray, *, seed: int, draws: int) -> np.ndarray:
    """Sums over all clusters of [M, ...], then over each draw of them: [1 + draws, ...]."""
    drawn = drawn_sums(counts, cluster_draws(len(counts), seed=seed, draws=draws))
    return np.concatenate([counts.sum(axis=0)[None], drawn])
