"""Where on a slide there is tissue, and whether it is stained with H&E."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lemon.slides.errors import SlideError
from lemon.slides.images import read_mask_image

OVERVIEW_MPP = 8.0
"""um/px of the picture on which tissue is looked for: a lymphocyte is one pixel, a gland is dozens."""

_MIN_OD = 0.05  # optical density that glass and dust stay below once the background is taken off
# Highest less lowest optical density of R, G and B, as a part of the highest: over 0.2 in H&E, 0 in grey.
_MIN_CHROMA = 0.1
_MIN_AREA_UM2 = 3_000.0  # specks smaller than some tens of cells are dirt


@dataclass(frozen=True)
class Tissue:
    """``mask`` bool [h, w] over the scanned area; ``share`` of true pixels."""

    mask: np.ndarray
    share: float


def find_tissue(overview: np.ndarray, *, mpp: float) -> Tissue:
    """Tissue of a bright-field slide: pixels that absorb clearly more than the slide's own background.

    Args:
        overview: uint8 [h, w, 3] of the scanned area.
        mpp: its um/px.
    """
    density = optical_density(overview)  # [h, w, 3]
    # Green is where both stains of H&E absorb most.
    green = cv2.GaussianBlur(density[..., 1], (0, 0), 1.0)
    background = float(np.percentile(green, 5))
    threshold = max(_MIN_OD, _otsu(green - background) * 0.5)
    mask: np.ndarray = (green - background > threshold).astype(np.uint8)
    if background > 0.15:  # no glass in sight: a crop of a slide, tissue throughout
        mask = (green > _MIN_OD).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    mask = _without_specks(mask, min_px=_MIN_AREA_UM2 / mpp**2)
    mask = cv2.dilate(mask, np.ones((3, 3), np.uint8))
    return Tissue(mask=mask.astype(bool), share=float(mask.mean()))


def read_mask(path: str | Path) -> Tissue:
    """A mask image given by the user, any size, non-zero is tissue. Raises SlideError when it cannot be read."""
    mask = read_mask_image(path, error=SlideError)
    return Tissue(mask=mask, share=float(mask.mean()))


def reason_not_he(overview: np.ndarray, mask: np.ndarray) -> str | None:
    """Why a slide cannot be H&E in bright field, or None.

    Both hematoxylin and eosin absorb green more than red and blue; a fluorescence scan is dark all over, the brown of
    DAB absorbs blue most, and a grey picture absorbs all alike.
    """
    if np.median(overview) < 60:
        return f"not H&E: dark background (median grey {np.median(overview):.0f} of 255), as of fluorescence"
    if not mask.any():
        return None
    if _is_grey(overview, mask):
        return "not H&E: no colour in the tissue (R, G and B absorb alike), as of a greyscale picture"
    red, green, blue = np.median(optical_density(overview[mask]), axis=0)
    if green < 0.9 * max(red, blue):
        return (
            f"not H&E: optical density of the tissue is {red:.2f}, {green:.2f}, {blue:.2f} (R, G, B), green not highest"
        )
    return None


def _is_grey(overview: np.ndarray, mask: np.ndarray) -> bool:
    """Whether even the most colourful tenth of the tissue has no colour; marks of a black pen thus do not matter."""
    smooth = cv2.GaussianBlur(overview, (0, 0), 1.5)  # takes the noise of single pixels off
    density = planes_of(optical_density(smooth[mask]))
    glass = smooth[~mask]
    if len(glass) > 0.01 * mask.size:
        # A tint of the lamp lies over the tissue too.
        density = density - np.median(optical_density(glass), axis=0)[:, None]
    highest = density.max(axis=0)
    return bool(np.percentile(highest - density.min(axis=0), 90) < _MIN_CHROMA * np.percentile(highest, 90))


def optical_density(image: np.ndarray) -> np.ndarray:
    """-log10(value / 255) of uint8 values, float32 of the same shape; 0 counts as 1."""
    return _DENSITY[image]


_DENSITY = (-np.log10(np.maximum(np.arange(256), 1) / 255)).astype(np.float32)


def planes_of(pixels: np.ndarray) -> np.ndarray:
    """[..., 3] as [3, ...], contiguous: numpy takes ten times as long over a last axis of three."""
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def _otsu(values: np.ndarray) -> float:
    """Otsu's threshold of float values of an image, through 8 bits over [0, 1]."""
    grey = np.clip(values * 255, 0, 255).astype(np.uint8)
    threshold, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(threshold) / 255


def _without_specks(mask: np.ndarray, *, min_px: float) -> np.ndarray:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    return keep[labels].astype(np.uint8) if count > 1 else mask
