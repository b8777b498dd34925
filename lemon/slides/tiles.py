"""The regions that a slide is cut into: overlapping squares whose inner parts tile the slide without gap or overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Region:
    """A square of base px (0.25 um/px) that is read at once.

    ``x_px, y_px`` is the corner of what is read; the inner part, which owns its nuclei, lies ``margin_px`` inside.
    """

    index: int
    x_px: int
    y_px: int
    size_px: int
    margin_px: int

    @property
    def inner_px(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1 of the inner part in base px, half open."""
        side = self.size_px - 2 * self.margin_px
        x0, y0 = self.x_px + self.margin_px, self.y_px + self.margin_px
        return x0, y0, x0 + side, y0 + side


def plan_regions(
    bounds_px: tuple[int, int, int, int],
    *,
    size_px: int,
    overlap_px: int,
    tissue: np.ndarray | None = None,
    min_tissue_share: float = 0.0,
) -> list[Region]:
    """Regions over ``bounds_px`` (x, y, width, height; base px) in row order, those with too little tissue left out.

    ``tissue`` is a bool [h, w] picture of the same bounds at any scale; None means tissue everywhere.
    """
    left, top, width, height = bounds_px
    inner = size_px - overlap_px
    margin = overlap_px // 2
    regions: list[Region] = []
    for y in range(0, height, inner):
        for x in range(0, width, inner):
            box = x / width, y / height, min(x + inner, width) / width, min(y + inner, height) / height
            if tissue is None or _share(tissue, box) >= max(min_tissue_share, 1e-9):
                regions.append(Region(len(regions), left + x - margin, top + y - margin, size_px, margin))
    return regions


def _share(mask: np.ndarray, box: tuple[float, float, float, float]) -> float:
    """Share of true pixels in a box given in fractions of the picture; at least one pixel is looked at."""
    high, wide = mask.shape
    x0, y0 = int(box[0] * wide), int(box[1] * high)
    x1, y1 = max(x0 + 1, int(np.ceil(box[2] * wide))), max(y0 + 1, int(np.ceil(box[3] * high)))
    return float(mask[y0:y1, x0:x1].mean())


def spread(items: list[Region], count: int) -> Iterator[Region]:
    """``count`` regions evenly over a list, always the same ones."""
    for index in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)):
        yield items[index]
