"""How the coordinates of a file lie on a slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lemon.nuclei.given.config import Flip
from lemon.slides.reader import SlideReader

XENIUM_UM_PER_PX = 0.2125
"""Of Xenium's images, which the matrix of an alignment leads to."""


@dataclass(frozen=True)
class Layout:
    """How a file's coordinates lie on a slide."""

    unit: str
    scale: float  # level-0 px a unit
    flip: Flip = "none"
    offset_px: tuple[float, float] = (0.0, 0.0)
    setting: str = ""  # what says so, for messages
    to_slide: np.ndarray | None = None  # [3, 3], of level-0 px, before the flip

    def apply(self, points: np.ndarray, reader: SlideReader, *, centred: bool) -> np.ndarray:
        """Points of a file [V, 2] in level-0 px, whole numbers at pixel corners."""
        points = (points + 0.5 if centred else points) * self.scale
        if self.to_slide is not None:
            points = points @ self.to_slide[:2, :2].T + self.to_slide[:2, 2]
        if self.flip == "transpose":
            points = points[:, ::-1]
        elif self.flip != "none":
            size = np.array([reader.width_px, reader.height_px], float)
            runs_back = np.array([axis in self.flip for axis in "xy"])
            points = np.where(runs_back, size - points, points)
        return points + np.array(self.offset_px)


def is_inside(points: np.ndarray, reader: SlideReader) -> np.ndarray:
    """Which points [N, 2] lie in the scanned area: bool [N]; NaN does not."""
    x, y, width, height = reader.bounds_px
    return np.all((points >= (x, y)) & (points < (x + width, y + height)), axis=1)
