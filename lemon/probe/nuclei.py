"""Embedded nuclei of known class, batch and slide, which measures of robustness are over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
