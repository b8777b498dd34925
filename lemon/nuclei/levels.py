"""Instances from HoverFast's maps by markers at a fixed level of their gradients; what LEMON does by default.

The maps rise by 2 across a nucleus and fall where it ends and its neighbour begins. HoverFast stretches the gradients
to the range of their region, so that one steep place decides where all others are divided (``lemon.nuclei.instances``).
Here a marker is where neither map falls. That needs no calibration, and a nucleus is the same in every region that sees
it whole. HoverFast drops all that is small, by an opening and by its area; here small nuclei stay, and what the network
is not sure of is dropped.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from skimage.segmentation import watershed

from lemon.nuclei.instances import GRADIENT_SCALE, HALF, HVPrediction, Nucleus, hv_limits, polygons_from_labels

_SOBEL_SUM = 128  # response of Sobel's 5x5 kernel to a slope of 1 a pixel
_FALL = 0.02  # a pixel: what counts as falling; nuclei of 10 um rise by 0.05 a pixel
_MIN_MARKER_PX = 10
MIN_AREA_UM2 = {"level": 2.0, "range": 5.0}
"""Smaller nuclei are dropped, unless told otherwise: here, and by HoverFast's rule."""
MIN_PROBABILITY = 0.7
"""Mean over a nucleus. Chosen on held-out images with the area and the opening: docs/segmentation.md."""
_SIMPLIFY = 0.006  # share of the perimeter, as in HoverFast
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_SQUARE = np.ones((3, 3), np.uint8)  # threads are cut; a disc of 5 px takes nuclei of 2 um with them


def label_by_level(
    probability: np.ndarray, gradients: np.ndarray, *, min_area_px: float, min_probability: float = MIN_PROBABILITY
) -> np.ndarray:
    """Instance map int32 [H, W] of one region, 0 is background.

    Args:
        probability: uint8 [H, W], of ``HVPrediction``.
        gradients: int16 [2, H, W], of the horizontal map along x and of the vertical map along y, as of
            ``hoverfast_device.hv_gradients``.
        min_area_px: labels of fewer pixels are dropped.
        min_probability: labels are dropped whose mean probability is lower.

    Raises:
        ValueError: shapes do not agree, or the maps were not finite.
    """
    shape = probability.shape
    if len(shape) != 2 or gradients.shape != (2, *shape):
        raise ValueError(f"gradients: got {gradients.shape} for a mask {shape}, expected [2, H, W] for [H, W]")
    hv_limits(gradients)
    slope = np.minimum(*gradients) / np.float32(_SOBEL_SUM * GRADIENT_SCALE)  # the steeper fall of the two, [H, W]
    opened = cv2.morphologyEx((probability > HALF).view(np.uint8), cv2.MORPH_OPEN, _SQUARE)
    core = cv2.morphologyEx(((slope > -_FALL) & (opened > 0)).view(np.uint8), cv2.MORPH_OPEN, _CROSS)
    _, markers, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=4)
    markers[(stats[:, cv2.CC_STAT_AREA] < _MIN_MARKER_PX)[markers]] = 0
    labels: np.ndarray = watershed(np.maximum(-slope, 0), markers=markers, mask=opened > 0)
    area_px = np.bincount(labels.ravel())
    total = np.bincount(labels.ravel(), weights=probability.ravel())
    dropped = (area_px < min_area_px) | (total < 255 * min_probability * area_px)
    return np.where(dropped[labels], 0, labels).astype(np.int32)


def postprocess_by_level(
    region: np.ndarray,
    prediction: HVPrediction,
    calibration: Any,  # noqa: ARG001
    *,
    min_area_px: float,
) -> list[Nucleus]:
    """Nuclei of a region uint8 [H, W, 3] from its prediction; runs in any process. There is nothing to calibrate."""
    if prediction.gradients.shape[1:] != region.shape[:2]:
        raise ValueError(f"prediction: got {prediction.gradients.shape[1:]} for a region {region.shape[:2]}")
    labels = label_by_level(prediction.probability, prediction.gradients, min_area_px=min_area_px)
    return polygons_from_labels(labels, min_area_px=min_area_px, simplify=_SIMPLIFY)
