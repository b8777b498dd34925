"""What of a slide's tissue is of no use: pen, folds, and what is out of focus. No weights."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from lemon.slides.tissue import optical_density, planes_of

Flaw = Literal["pen", "fold"]
"""A fold is any tissue of twice the density in both stains: dense keratin is told as one."""

FOCUS_BLOCK_PX = 64
"""Side of the squares of a region whose focus is told: 16 um."""

MIN_FOCUS = -2.4
"""Scores below this are out of focus: a blur of 0.75 um has -2.4 to -2.8, sharp tissue more, also of a scan at 20x."""

_FOLD_TIMES = 1.7  # a second layer of tissue doubles the density; its median alone varies by less
_MIN_OD = 0.08  # of all three channels' mean, in a square or a crop; with less there is nothing to be in focus
_INK_OD = 0.2  # ink is at least this dense
_INK_REDNESS = 0.42
_MEAN = np.full(3, 1 / 3, np.float32)
_CROPS_AT_ONCE = 32


def find_flaws(overview: np.ndarray, tissue: np.ndarray, *, mpp: float) -> dict[Flaw, np.ndarray]:
    """Where there is pen and where tissue is folded, bool [h, w] each.

    Ink has colours that H&E has not: of the density of blue and green ink more is red than of any stained nucleus (see
    ``lemon.nuclei.hematoxylin``); black ink absorbs all alike, and strongly. A fold lies where red (hematoxylin) and
    green (both stains) absorb nearly twice what they do in the slide's tissue: dense nuclei raise the first alone.

    Args:
        overview: uint8 [h, w, 3], at about 8 um/px.
        tissue: bool [h, w], where to look.
        mpp: um/px of the overview.
    """
    density = planes_of(cv2.GaussianBlur(optical_density(overview), (0, 0), max(4.0 / mpp, 0.5)))
    (red, green, _), highest, lowest = density, density.max(0), density.min(0)
    coloured = (red > _INK_REDNESS * density.sum(0)) & (red > _INK_OD)
    black = (lowest > 0.8) & (highest - lowest < 0.25 * highest)
    pen = _closed((coloured | black) & tissue)
    clean = tissue & ~pen
    if not clean.any():
        return {"pen": pen, "fold": np.zeros_like(pen)}
    eosin = green - 0.8 * red  # hematoxylin absorbs green a little more than red
    typical = [max(float(np.median(plane[clean])), 0.03) for plane in (red, eosin)]
    fold = (red > _FOLD_TIMES * typical[0]) & (eosin > _FOLD_TIMES * typical[1]) & clean
    return {"pen": pen, "fold": _closed(fold) & clean}


def share_of(flaw: np.ndarray, tissue: np.ndarray) -> float:
    """Share of the tissue that a flaw takes, both bool [h, w]; 0 where there is no tissue."""
    return round(float((flaw & tissue).sum() / max(tissue.sum(), 1)), 4)


def _closed(mask: np.ndarray) -> np.ndarray:
    """Without single pixels, and with small gaps closed."""
    square = np.ones((3, 3), np.uint8)
    cleaned = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, square)
    return cv2.morphologyEx(cleaned, cv2.MORPH_CLOSE, square).astype(bool)


def focus_of_crops(images: np.ndarray) -> np.ndarray:
    """How sharp images of nuclei are, float32 [N]; NaN where there is nothing to be in focus.

    The base-2 logarithm of the energy of details of 1 um over that of 2 um: both scale with contrast, blur takes the
    first. Details are those of scans at 20x too, so that these are not called blurred. A band between two Gaussians is
    nearly a Laplacian of that scale, whose energy is a usual measure of focus (Pertuz et al.,
    10.1016/j.patcog.2012.11.011); the coarser one stands for the contrast, which that measure would follow.

    Args:
        images: uint8 [N, H, W, 3] at 0.25 um/px.
    """
    scores = [np.empty(0, np.float32)]
    for start in range(0, len(images), _CROPS_AT_ONCE):
        density = optical_density(images[start : start + _CROPS_AT_ONCE]) @ _MEAN  # [n, H, W]
        planes = np.ascontiguousarray(np.moveaxis(density, 0, -1))  # crops as channels, which OpenCV blurs together
        fine, coarse = (band.var(axis=(0, 1)) for band in _bands(planes))
        scores.append(_score(fine, coarse, planes.mean(axis=(0, 1))))
    return np.concatenate(scores)


def focus_of_region(region: np.ndarray) -> np.ndarray:
    """The same of each square of a region uint8 [H, W, 3] at 0.25 um/px, float32 [H / side, W / side]."""
    side_px = FOCUS_BLOCK_PX
    rows, columns = (length // side_px for length in region.shape[:2])

    def squares(plane: np.ndarray) -> np.ndarray:  # [H, W] -> [rows, side, columns, side]
        return plane[: rows * side_px, : columns * side_px].reshape(rows, side_px, columns, side_px)

    density = optical_density(region) @ _MEAN
    fine, coarse = (squares(band).var(axis=(1, 3)) for band in _bands(density))
    return _score(fine, coarse, squares(density).mean(axis=(1, 3)))


def _bands(density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Details of 1 um and of 2 um, each float32 of the shape of density: [H, W] or [H, W, n]."""
    fine, middle, coarse = (
        cv2.GaussianBlur(density, (0, 0), sigma).reshape(density.shape) for sigma in (1.0, 2.0, 4.0)
    )
    return fine - middle, middle - coarse


def _score(fine: np.ndarray, coarse: np.ndarray, mean_od: np.ndarray) -> np.ndarray:
    """From the energies of details and the mean density, float32 of their shape."""
    return np.where(mean_od < _MIN_OD, np.nan, np.log2((fine + 1e-9) / (coarse + 1e-9))).astype(np.float32)


def blurred_share(regions: list[np.ndarray]) -> float | None:
    """Share of the squares with tissue of regions, uint8 [H, W, 3] each, that are out of focus; None without any."""
    scores = np.concatenate([focus_of_region(region).ravel() for region in regions] or [np.empty(0, np.float32)])
    scores = scores[np.isfinite(scores)]
    return round(float((scores < MIN_FOCUS).mean()), 4) if len(scores) else None
