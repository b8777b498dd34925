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

from lemon.nuclei.instances import GRADIENT_SCALE, HALF, HVPrediction, Nucleus, hv_limits, nuclei_of
from lemon.nuclei.pieces import Sheet, connected_parts, large_outlines, mean_by_piece

_SLOPE = 128 * GRADIENT_SCALE  # gradient where a map rises by 1 a pixel: the sum of Sobel's 5x5 kernel, in its steps
_FALL = -0.02 * _SLOPE  # what counts as falling; nuclei of 10 um rise by 0.05 a pixel
_MIN_MARKER_PX = 10
MIN_AREA_UM2 = {"level": 2.0, "range": 5.0}
"""Smaller nuclei are dropped, unless told otherwise: here, and by HoverFast's rule."""
MIN_PROBABILITY = 0.7
"""Mean over a nucleus. Chosen on held-out images with the area and the opening: docs/segmentation.md."""
_SIMPLIFY = 0.006  # share of the perimeter, as in HoverFast
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_SQUARE = np.ones((3, 3), np.uint8)  # threads are cut; a disc of 5 px takes nuclei of 2 um with them


def find_nuclei_by_level(
    probability: np.ndarray, gradients: np.ndarray, *, min_area_px: float, min_probability: float = MIN_PROBABILITY
) -> list[Nucleus]:
    """Nuclei of one region, those at its border too.

    Args:
        probability: uint8 [H, W], of ``HVPrediction``.
        gradients: int16 [2, H, W], of the horizontal map along x and of the vertical map along y, as of
            ``hoverfast_device.hv_gradients``.
        min_area_px: nuclei of fewer pixels are dropped.
        min_probability: nuclei are dropped whose mean probability is lower.

    Raises:
        ValueError: shapes do not agree, or the maps were not finite.
    """
    shape = probability.shape
    if len(shape) != 2 or gradients.shape != (2, *shape):
        raise ValueError(f"gradients: got {gradients.shape} for a mask {shape}, expected [2, H, W] for [H, W]")
    hv_limits(gradients)
    steepest = np.minimum(*gradients)  # the steeper fall of the two, [H, W]
    pieces = cv2.morphologyEx((probability > HALF).view(np.uint8), cv2.MORPH_OPEN, _SQUARE)
    core = cv2.morphologyEx((steepest > _FALL).view(np.uint8) & pieces, cv2.MORPH_OPEN, _CROSS)
    piece_ids = cv2.connectedComponents(pieces, connectivity=4)[1]
    outlines = large_outlines(pieces, piece_ids, min_area_px=min_area_px)
    n_markers, least = _count_markers(core, piece_ids), 255 * min_probability
    sure = mean_by_piece(probability, piece_ids, pieces) >= least
    contours = [each for each in outlines.items() if n_markers[each[0]] == 1 and sure[each[0]]]
    if crowds := {piece_id: outline for piece_id, outline in outlines.items() if n_markers[piece_id] > 1}:
        sheet = Sheet(crowds, piece_ids)
        relief = np.maximum(-sheet.lay(steepest).astype(np.int32), 0)
        contours += sheet.divide(
            relief,
            seeds=sheet.own(core),
            inside=sheet.own(pieces),
            min_area_px=min_area_px,
            weight=sheet.lay(probability),
            min_weight=least,
        )
    contours.sort(key=lambda one: one[0])
    return nuclei_of([contour for _, contour in contours], simplify=_SIMPLIFY)


def _count_markers(core: np.ndarray, piece_ids: np.ndarray) -> np.ndarray:
    """How many parts of uint8 [H, W], 0 or 1, each piece of int32 [H, W] holds; those too small are removed from it."""
    parts = connected_parts(core)
    large = np.bincount(parts.part, minlength=parts.count) >= _MIN_MARKER_PX
    core.ravel()[parts.at[~large[parts.part]]] = 0
    return np.bincount(parts.pieces(piece_ids)[large], minlength=int(piece_ids.max()) + 1)


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
    return find_nuclei_by_level(prediction.probability, prediction.gradients, min_area_px=min_area_px)
