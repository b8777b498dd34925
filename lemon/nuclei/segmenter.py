"""What every segmenter offers. The work is split where it runs: calibration once a slide, the network on a device,
instances in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from lemon.nuclei.instances import Nucleus

Postprocess = Callable[[np.ndarray, Any, Any], list[Nucleus]]
"""(region uint8 [H, W, 3], prediction, calibration) -> nuclei in region px; picklable."""


class Segmenter(Protocol):
    """Finds nuclei in regions at 0.25 um/px."""

    def calibrate(self, samples: Sequence[np.ndarray]) -> Any:
        """Thresholds of one slide from some of its tissue regions, uint8 [H, W, 3] each. The result is picklable.

        Regions then share them, so that a nucleus is the same in both regions that see it.
        """

    def predict(self, regions: np.ndarray) -> list[Any]:
        """What the network says of uint8 [B, H, W, 3]: one picklable prediction a region (None without a network)."""

    @property
    def postprocess(self) -> Postprocess:
        """The function that turns region, prediction and calibration into nuclei."""
