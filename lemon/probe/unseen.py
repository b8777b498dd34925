"""What a probe loses on hospitals or scanners that it has not seen: accuracy, and the truth of its confidence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lemon.probe.linear import class_probabilities, fit_classifier
from lemon.probe.metrics import Interval, balanced_accuracy_of
from lemon.probe.nuclei import Nuclei, confusions, over_draws, resampled

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
    drops: list[np.ndarray] = []  # [1 + draws] each: the value, and that of every draw
    errors: list[list[np.ndarray]] = []  # the same of (seen, unseen)
    generator, drawing = np.random.default_rng(seed), {"seed": seed, "draws": draws}
    for sides in leave_each_batch_out(nuclei, seed=seed):
        seen, unseen = (balanced_accuracy_of(resampled(_confusions(side), side.slide, **drawing)) for side in sides)
        drops.append(1 - unseen / seen)
        n = min(len(side.truth) for side in sides)
        alike = [side.take(generator.choice(len(side.truth), n, replace=False)) for side in sides]
        errors.append([calibration_error(resampled(confidence_bins(side), side.slide, **drawing)) for side in alike])
    if not drops:
        return {}
    seen, unseen = np.mean(errors, axis=0)
    errors_by_name = {"ece_seen": seen, "ece_unseen": unseen, "calibration_shift": unseen - seen}
    shifted = {name: over_draws(_about_the_value(each)) for name, each in errors_by_name.items()}
    return {"performance_drop": over_draws(np.mean(drops, axis=0)), **shifted}


def leave_each_batch_out(nuclei: Nuclei, *, seed: int) -> Iterator[tuple[Scored, Scored]]:
    """For each batch: a probe of half of the others' slides, scored on their other half and on the batch left out.

    C has the best inner log loss, so that probabilities are as true as the training part allows.
    """
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
        model = fit_classifier(part.embedding, part.labels, groups=part.slide, seed=seed, criterion="log_loss").model
        seen, unseen = (
            Scored(side.labels, class_probabilities(model, side.embedding, classes=classes), side.slide)
            for side in (nuclei.take(known), nuclei.take(unknown))
        )
        yield seen, unseen


def confidence_bins(scored: Scored) -> np.ndarray:
    """(1, confidence, hit) at the bin of each nucleus' confidence, that of its likeliest class: [N, bins, 3]."""
    confidence = scored.probability.max(axis=1)
    hit = scored.probability.argmax(axis=1) == scored.truth
    at = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = np.zeros((len(at), BINS, 3))
    bins[np.arange(len(at)), at] = np.stack([np.ones_like(confidence), confidence, hit], axis=1)
    return bins


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error of ``confidence_bins`` that are summed over nuclei: [..., bins, 3] gives [...].

    |mean confidence - share of hits|, averaged over bins by their nuclei. Source: Guo et al., On Calibration of Modern
    Neural Networks (arXiv 1706.04599).
    """
    count, confidence, hits = np.moveaxis(sums, -1, 0)
    return np.asarray(np.abs(confidence - hits).sum(axis=-1) / count.sum(axis=-1))


def _about_the_value(values: np.ndarray) -> np.ndarray:
    """A value and that of its draws [1 + draws], the draws moved so that their median is the value.

    Bins add up absolute differences, which chance enlarges, in a draw of slides more than in the slides themselves:
    without this the error of all slides would lie below the interval of the draws.
    """
    return np.concatenate([values[:1], values[1:] - np.nanmedian(values[1:]) + values[0]])


def _confusions(scored: Scored) -> np.ndarray:
    return confusions(scored.truth, scored.probability.argmax(axis=1), classes=scored.probability.shape[1])
