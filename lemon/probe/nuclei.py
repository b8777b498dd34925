"""Embedded nuclei of known class, batch and slide, which measures of robustness are over; and draws of whole slides."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lemon.probe.metrics import Interval, cluster_draws, interval


@dataclass(frozen=True)
class Nuclei:
    """One row a nucleus.

    Args:
        embedding: float32 [N, D].
        labels: int [N], indices of classes.
        batch: str [N], hospital or scanner.
        slide: str [N]; a slide is of one batch.
    """

    embedding: np.ndarray
    labels: np.ndarray
    batch: np.ndarray
    slide: np.ndarray

    def take(self, rows: np.ndarray) -> Nuclei:
        """Those of the given indices, or of a mask."""
        return Nuclei(self.embedding[rows], self.labels[rows], self.batch[rows], self.slide[rows])


def resampled(values: np.ndarray, slide: np.ndarray, *, seed: int, draws: int) -> np.ndarray:
    """Sums of values [N, ...] over all nuclei, then over those of each draw of whole slides: [1 + draws, ...]."""
    names, member = np.unique(slide, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, member, values)
    drawn = np.tensordot(cluster_draws(len(names), seed=seed, draws=draws), sums, axes=(1, 0))
    return np.concatenate([sums.sum(axis=0)[None], drawn])


def confusions(truth: np.ndarray, predicted: np.ndarray, *, classes: int) -> np.ndarray:
    """One at (true class, predicted class) of each nucleus: [N, K, K]."""
    ones = np.zeros((len(truth), classes, classes))
    ones[np.arange(len(truth)), truth, predicted] = 1
    return ones


def over_draws(values: np.ndarray) -> Interval:
    """Of [1 + draws] the first, with its interval by the others."""
    return interval(float(values[0]), values[1:])
