"""From per-pixel predictions or label images to one polygon a nucleus.

Coordinates are region pixels, x then y, with integers at pixel centres, as OpenCV's contours have them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from scipy import ndimage

from lemon.nuclei.pieces import Sheet, connected_parts, large_outlines, outer_contour

# Constants of HoverFast's post-processing (10.21105/joss.07022).
_EDGE_THRESHOLD = 0.4
_SIMPLIFY = 0.006  # share of the perimeter
GRADIENT_SCALE = 128
"""What a gradient is multiplied by to be held as int16: maps in [-1, 1] give at most 96, and 256 fits."""
NOT_FINITE = np.iinfo(np.int16).min
"""Stands for the gradient of a map that is NaN or infinite there."""
HALF = 127
"""Pixels of a higher probability, in 255ths, are nucleus."""

_ELLIPSE = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


@dataclass(frozen=True)
class Nucleus:
    """One nucleus in the frame of its region.

    ``centroid_px`` is the centroid of the polygon rounded down to half a pixel. HoverFast truncates it to whole
    pixels; half pixels stay within 1 px of its value and within 0.71 px of the exact one, and because regions start
    at whole pixels, a nucleus seen by two regions keeps the same centroid on the slide.
    """

    contour_px: np.ndarray  # [N, 2] float32, x, y in region pixels, N >= 3, first point not repeated
    centroid_px: tuple[float, float]  # x, y
    # What the program that found it says of it, where it was not LEMON:
    foreign_id: str | None = None
    foreign_class: str | None = None
    foreign_probability: float | None = None


@dataclass(frozen=True)
class HVLimits:
    """Range of the gradients of the two maps that counts as 0 to 1, when it is to be a slide's and not a region's.

    The gradients are Sobel responses (ksize 5), times ``GRADIENT_SCALE``, of the horizontal map along x and of the
    vertical map along y.
    """

    horizontal: tuple[int, int]  # lowest, highest
    vertical: tuple[int, int]


@dataclass(frozen=True)
class HVPrediction:
    """What the network says of one region, small enough to hand to another process.

    Of the horizontal and the vertical map only the gradients are used, so that these are what is handed on.
    """

    probability: np.ndarray  # uint8 [H, W], in 255ths: that a pixel is nucleus
    gradients: np.ndarray  # int16 [2, H, W], as of ``hoverfast_device.hv_gradients``

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        return self.probability > HALF


def find_nuclei(
    mask: np.ndarray, gradients: np.ndarray, *, min_area_px: float, limits: HVLimits | None = None
) -> list[Nucleus]:
    """Instances of one region by HoverFast's post-processing (10.21105/joss.07022).

    Where the gradients of the maps mark two or more nuclei inside a connected piece of the mask, a watershed divides
    it. All nuclei of the region are returned, those at its border too: who owns them is the caller's to decide.

    Args:
        mask: bool or uint8 [H, W], non-zero where a pixel is nucleus.
        gradients: int16 [2, H, W], of the horizontal map along x and of the vertical map along y, as of
            ``hoverfast_device.hv_gradients``.
        min_area_px: pieces of fewer pixels, and polygons of an area not above it, are dropped.
        limits: the range to normalise gradients by; by default the region's own, as the original does.

    Returns:
        Nuclei in the order of the pieces' first pixels.

    Raises:
        ValueError: shapes do not agree, or the maps were not finite.
    """
    if mask.ndim != 2 or gradients.shape != (2, *mask.shape):
        raise ValueError(f"gradients: got {gradients.shape} for a mask {mask.shape}, expected [2, H, W] for [H, W]")
    if mask.size == 0 or not mask.any():
        return []
    own = hv_limits(gradients)
    limits = limits or own
    pieces = np.ascontiguousarray(mask if mask.dtype == bool else mask != 0).view(np.uint8)
    opened = cv2.morphologyEx(pieces, cv2.MORPH_OPEN, _ELLIPSE, iterations=2)
    away = _away_from_edges(gradients, opened, limits=limits)
    piece_ids = cv2.connectedComponents(pieces, connectivity=4)[1]
    crowded = set(np.flatnonzero(np.bincount(connected_parts(away).pieces(piece_ids)[1:]) > 1).tolist())
    outlines = large_outlines(pieces, piece_ids, min_area_px=min_area_px)
    contours = [(piece_id, outline) for piece_id, outline in outlines.items() if piece_id not in crowded]
    if crowds := {piece_id: outline for piece_id, outline in outlines.items() if piece_id in crowded}:
        sheet = Sheet(crowds, piece_ids)
        relief = _relief([sheet.lay(gradient) for gradient in gradients], sheet.lay(opened), limits=limits)
        contours += sheet.divide(relief, seeds=_filled(sheet.own(away)), inside=sheet.own(opened))
    contours.sort(key=lambda one: one[0])
    return nuclei_of([contour for _, contour in contours], simplify=_SIMPLIFY, larger_than_px=min_area_px)


def hv_limits(gradients: np.ndarray) -> HVLimits:
    """Lowest and highest gradient of one region, int16 [2, H, W]. Raises ValueError where the maps were not finite."""
    (low_h, low_v), (high_h, high_v) = gradients.min(axis=(1, 2)).tolist(), gradients.max(axis=(1, 2)).tolist()
    if min(low_h, low_v) == NOT_FINITE:
        raise ValueError("maps: got NaN or infinity, expected finite values; try precision=fp32")
    return HVLimits(horizontal=(low_h, high_h), vertical=(low_v, high_v))


def calibrate_limits(predictions: Sequence[HVPrediction]) -> HVLimits | None:
    """Medians over regions of each region's limits; regions without nuclei say nothing, and None is no limits."""
    each = [hv_limits(p.gradients) for p in predictions if p.mask.any()]
    if not each:
        return None
    medians = np.median([(*one.horizontal, *one.vertical) for one in each], axis=0)
    low_h, high_h, low_v, high_v = np.rint(medians).astype(int).tolist()
    return HVLimits(horizontal=(low_h, high_h), vertical=(low_v, high_v))


def postprocess_hv(
    region: np.ndarray, prediction: HVPrediction, calibration: HVLimits | None, *, min_area_px: float
) -> list[Nucleus]:
    """Nuclei of a region uint8 [H, W, 3] from its prediction, with the limits of its slide; runs in any process."""
    if prediction.gradients.shape[1:] != region.shape[:2]:
        raise ValueError(f"prediction: got {prediction.gradients.shape[1:]} for a region {region.shape[:2]}")
    return find_nuclei(prediction.mask, prediction.gradients, min_area_px=min_area_px, limits=calibration)


def _away_from_edges(gradients: np.ndarray, opened: np.ndarray, *, limits: HVLimits) -> np.ndarray:
    """uint8 [H, W]: 1 where the opened mask, uint8 [H, W], is and the edges between nuclei are weak."""
    # An edge is no weaker than each of its two parts, so that few pixels are left to compute it at.
    ranges = (limits.horizontal, limits.vertical)
    least = [math.floor(high - _EDGE_THRESHOLD * (high - low)) - 1 for low, high in ranges]
    at = np.flatnonzero((gradients[0] > least[0]) & (gradients[1] > least[1]) & opened.view(bool))
    away = np.zeros(opened.shape, np.uint8)
    if len(at):
        edges = _edges(*(gradient.ravel()[at] for gradient in gradients), limits=limits)
        away.ravel()[at[edges.ravel() < _EDGE_THRESHOLD]] = 1
    return away


def _relief(gradients: Sequence[np.ndarray], opened: np.ndarray, *, limits: HVLimits) -> np.ndarray:
    """What is flooded, float64 [h, w] in [-1, 0]: deepest amid nuclei. Takes two gradients and the opened mask."""
    return -cv2.GaussianBlur((1 - _edges(*gradients, limits=limits)) * opened, (3, 3), 0).astype(np.float64)


def _edges(horizontal: np.ndarray, vertical: np.ndarray, *, limits: HVLimits) -> np.ndarray:
    """Strength of the edges between nuclei by their gradients, float32 in [0, sqrt(2)]; of use inside the mask only."""
    return cv2.magnitude(_inverted(horizontal, *limits.horizontal), _inverted(vertical, *limits.vertical))


def _inverted(gradient: np.ndarray, low: int, high: int) -> np.ndarray:
    """1 where the gradient is at its lowest, 0 where at its highest; all 1 where it is constant, as OpenCV has it."""
    if low >= high:
        return np.ones(gradient.shape, np.float32)
    within, scale = np.clip(gradient, low, high), 1 / (high - low)
    return cv2.addWeighted(within, -scale, within, 0, high * scale, dtype=cv2.CV_32F)


def _filled(seeds: np.ndarray) -> np.ndarray:
    """uint8 [h, w], 0 or 1, with the holes of its parts filled."""
    padded = cv2.copyMakeBorder(seeds, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(padded, None, (0, 0), 2)  # what is left 0 cannot be reached from outside: holes
    return (padded[1:-1, 1:-1] != 2).view(np.uint8)


def polygons_from_labels(labels: np.ndarray, *, min_area_px: float, simplify: float = 0.0) -> list[Nucleus]:
    """Outer contour of every label of an instance map.

    Args:
        labels: integer [H, W], 0 is background; a label is expected to be one connected piece, and of a label in
            several pieces the largest is kept.
        min_area_px: labels of fewer pixels are dropped.
        simplify: Douglas-Peucker tolerance as a share of the contour's perimeter (HoverFast: 0.006); 0 keeps every
            corner of the contour.

    Returns:
        Nuclei in the order of their labels. Labels too thin to enclose an area (one pixel, a line) are dropped.

    Raises:
        ValueError: labels are not a two-dimensional integer array, or simplify is negative.
    """
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: got {labels.dtype} {labels.shape}, expected an integer array [H, W]")
    if simplify < 0:
        raise ValueError(f"simplify: got {simplify}, expected a share of the perimeter, 0 or more")
    contours = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        cell = labels[box] == label
        if np.count_nonzero(cell) >= min_area_px:
            contours.append(outer_contour(cell, x0_px=box[1].start, y0_px=box[0].start))
    return nuclei_of(contours, simplify=simplify)


def nuclei_of(contours: Sequence[np.ndarray], *, simplify: float, larger_than_px: float = 0.0) -> list[Nucleus]:
    """Contours int32 [N, 1, 2] to nuclei: simplified, those that enclose no more than an area left out.

    Args:
        contours: in region pixels.
        simplify: Douglas-Peucker tolerance as a share of the perimeter; 0 keeps every corner.
        larger_than_px: the area.

    Self-intersecting ones are repaired, which may make them a little smaller than that.
    """
    if simplify:
        contours = [cv2.approxPolyDP(c, simplify * cv2.arcLength(c, closed=True), closed=True) for c in contours]
    rings = [contour[:, 0, :] for contour in contours if len(contour) >= 3]
    shapes = _moments(rings)
    rings = [ring for ring, area in zip(rings, shapes[0].tolist(), strict=True) if area > larger_than_px]
    if not rings:
        return []
    shapes = shapes[:, shapes[0] > larger_than_px]
    index = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    valid = shapely.is_valid(shapely.polygons(shapely.linearrings(np.concatenate(rings), indices=index)))
    for i in np.flatnonzero(~valid).tolist():
        rings[i] = _repaired(rings[i])
        shapes[:, i] = _moments([rings[i]])[:, 0] if len(rings[i]) else 0
    area, x, y = shapes
    centroids = zip((np.floor(2 * x) / 2).tolist(), (np.floor(2 * y) / 2).tolist(), strict=True)
    return [
        Nucleus(ring.astype(np.float32), centroid_px)
        for ring, has_area, centroid_px in zip(rings, (area > 0).tolist(), centroids, strict=True)
        if has_area
    ]


def _moments(rings: Sequence[np.ndarray]) -> np.ndarray:
    """Area and centroid (x, y) by the shoelace formula, float64 [3, rings]; a centroid without an area is no number."""
    if not rings:
        return np.empty((3, 0))
    ends = np.cumsum([len(ring) for ring in rings])
    after = np.arange(1, ends[-1] + 1)
    after[ends - 1] = starts = ends - [len(ring) for ring in rings]
    x, y = np.concatenate(rings).T.astype(np.float64)
    cross = x * y[after] - x[after] * y
    twice, *first = np.add.reduceat((cross, cross * (x + x[after]), cross * (y + y[after])), starts, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.stack((np.abs(twice) / 2, *(moment / (3 * twice) for moment in first)))


def _repaired(ring: np.ndarray) -> np.ndarray:
    """Exterior of the largest polygon of a self-intersecting ring, float [N, 2]; empty where there is none."""
    parts = shapely.get_parts(shapely.make_valid(shapely.polygons(ring), method="structure", keep_collapsed=False))
    areas = shapely.area(parts)
    if len(parts) == 0 or areas.max() == 0:
        return np.empty((0, 2))
    return shapely.get_coordinates(shapely.get_exterior_ring(parts[areas.argmax()]))[:-1]
