"""Made-up fields whose nuclei are dark discs, so that a test can tell where a crop is centred and at what scale."""

from __future__ import annotations

import cv2
import numpy as np

from lemon.schema import CELL_MPP

RADIUS_UM = 3.0
GROUND, DISC = (225, 190, 215), (70, 40, 110)


def field(width_px: int, height_px: int, centre_px: object, *, mpp: float) -> np.ndarray:
    """uint8 [H, W, 3]: discs of 3 um at centres [N, 2] (x, y), in px of ``mpp`` um/px, to a sixteenth of a px."""
    image = np.full((height_px, width_px, 3), GROUND, np.uint8)
    # cv2 fills the px on the circle too: half a px less.
    for x, y in np.asarray(centre_px, float).reshape(-1, 2):
        at = round(x * 16), round(y * 16)
        cv2.circle(image, at, round((RADIUS_UM / mpp - 0.5) * 16), DISC, -1, cv2.LINE_AA, shift=4)
    return image


def disc(crop: np.ndarray) -> tuple[float, float, float]:
    """Centre x, y in px, and radius in um, of the dark px of a crop [60, 60, 3]."""
    dark = (crop[..., 0] < 150).astype(float)
    y, x = np.nonzero(dark)
    return float(x.mean()), float(y.mean()), float(np.sqrt(dark.sum() / np.pi)) * CELL_MPP


def assert_centred(images: np.ndarray) -> None:
    """Every crop has one disc of 3 um in its middle, within a px."""
    for crop in images:
        x, y, radius_um = disc(crop)
        assert abs(x - 29.5) < 0.9, (x, y)
        assert abs(y - 29.5) < 0.9, (x, y)
        assert abs(radius_um - RADIUS_UM) < 0.15, radius_um
