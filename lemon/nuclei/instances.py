"""From per-pixel predictions or label images to one polygon a nucleus.

Coordinates are region pixels, x then y, with integers at pixel centres, as OpenCV's contours have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from scipy import ndimage
from skimage.segmentation import watershed

# Constants of HoverFast's post-processing (10.21105/joss.07022).
_EDGE_THRESHOLD = 0.4
_SIMPLIFY = 0.006  # share of the perimeter
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

    The gradients are Sobel responses (ksize 5) of the horizontal map along x and of the vertical map along y.
    """

    horizontal: tuple[float, float]  # lowest, highest
    vertical: tuple[float, float]


@dataclass(frozen=True)
class HVPrediction:
    """What the network says of one region, small enough to hand to another process."""

    mask_bits: np.ndarray  # np.packbits of bool [H, W]: nucleus or not
    hv_maps: np.ndarray  # float16 [2, H, W]: horizontal, vertical

    @classmethod
    def pack(cls, mask: np.ndarray, hv_maps: np.ndarray) -> HVPrediction:
        """From bool [H, W] and float [2, H, W]."""
        return cls(np.packbits(mask), hv_maps.astype(np.float16, copy=False))

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        shape = self.hv_maps.shape[1:]
        return np.unpackbits(self.mask_bits, count=shape[0] * shape[1]).reshape(shape).view(bool)


def find_nuclei(
    mask: np.ndarray, hv_maps: np.ndarray, *, min_area_px: float, limits: HVLimits | None = None
) -> list[Nucleus]:
    """Instances of one region by HoverFast's post-processing (10.21105/joss.07022).

    Where the gradients of the maps mark two or more nuclei inside a connected piece of the mask, a watershed divides
    it. All nuclei of the region are returned, those at its border too: who owns them is the caller's to decide.

    Args:
        mask: bool or uint8 [H, W], non-zero where a pixel is nucleus.
        hv_maps: float [2, H, W], the horizontal and the vertical map, in about [-1, 1]; any float type.
        min_area_px: pieces of fewer pixels, and polygons of an area not above it, are dropped.
        limits: the range to normalise gradients by; by default the region's own, as the original does.

    Raises:
        ValueError: shapes do not agree, or the maps are not finite.
    """
    if mask.ndim != 2 or hv_maps.shape != (2, *mask.shape):
        raise ValueError(f"maps: got {hv_maps.shape} for a mask {mask.shape}, expected [2, H, W] for [H, W]")
    if mask.size == 0 or not mask.any():
        return []
    pieces = np.ascontiguousarray(mask != 0).view(np.uint8)
    opened = cv2.morphologyEx(pieces, cv2.MORPH_OPEN, _ELLIPSE, iterations=2)
    edges = _edges(hv_gradients(hv_maps), limits=limits)
    markers = _markers(edges, opened=opened)
    relief = -cv2.GaussianBlur((1 - edges) * opened, (3, 3), 0)

    contours = []
    _, piece_ids, stats, _ = cv2.connectedComponentsWithStats(pieces, connectivity=4)
    for piece_id in np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= min_area_px):
        if piece_id == 0:  # background
            continue
        x_px, y_px, w_px, h_px = stats[piece_id, :4].tolist()
        box = slice(y_px, y_px + h_px), slice(x_px, x_px + w_px)
        piece = piece_ids[box] == piece_id
        own_markers = markers[box] * piece
        for cell in _divided(piece, markers=own_markers, relief=relief[box], opened=opened[box]):
            contour = _simplified(outer_contour(cell, x0_px=x_px, y0_px=y_px), simplify=_SIMPLIFY)
            if cv2.contourArea(contour) > min_area_px:
                contours.append(contour)
    return _nuclei(contours)


def hv_gradients(hv_maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sobel responses float32 [H, W] of the horizontal map along x and of the vertical map along y.

    The original first stretches each map to [0, 1]; as the responses are stretched again afterwards and Sobel is
    linear and blind to a constant, that step changes nothing but rounding, and is left out.
    """
    horizontal, vertical = (np.ascontiguousarray(m, dtype=np.float32) for m in hv_maps)
    if not (np.isfinite(horizontal).all() and np.isfinite(vertical).all()):
        raise ValueError("maps: got NaN or infinity, expected finite values; try precision=fp32")
    return (
        cv2.Sobel(horizontal, cv2.CV_32F, 1, 0, ksize=5),
        cv2.Sobel(vertical, cv2.CV_32F, 0, 1, ksize=5),
    )


def hv_limits(gradients: tuple[np.ndarray, np.ndarray]) -> HVLimits:
    """Lowest and highest gradient of one region."""
    horizontal, vertical = (cv2.minMaxLoc(g)[:2] for g in gradients)
    return HVLimits(horizontal=(horizontal[0], horizontal[1]), vertical=(vertical[0], vertical[1]))


def calibrate_limits(predictions: Sequence[HVPrediction]) -> HVLimits | None:
    """Medians over regions of each region's limits; regions without nuclei say nothing, and None is no limits."""
    each = [hv_limits(hv_gradients(p.hv_maps)) for p in predictions if p.mask_bits.any()]
    if not each:
        return None
    low_h, high_h, low_v, high_v = np.median([(*one.horizontal, *one.vertical) for one in each], axis=0).tolist()
    return HVLimits(horizontal=(low_h, high_h), vertical=(low_v, high_v))


def postprocess_hv(
    region: np.ndarray, prediction: HVPrediction, calibration: HVLimits | None, *, min_area_px: float
) -> list[Nucleus]:
    """Nuclei of a region uint8 [H, W, 3] from its prediction, with the limits of its slide; runs in any process."""
    if prediction.hv_maps.shape[1:] != region.shape[:2]:
        raise ValueError(f"prediction: got {prediction.hv_maps.shape[1:]} for a region {region.shape[:2]}")
    return find_nuclei(prediction.mask, prediction.hv_maps, min_area_px=min_area_px, limits=calibration)


def _edges(gradients: tuple[np.ndarray, np.ndarray], *, limits: HVLimits | None) -> np.ndarray:
    """Strength of the edges between nuclei, float32 [H, W] in [0, sqrt(2)]; of use inside the opened mask only."""
    used = limits or hv_limits(gradients)
    ranges = (used.horizontal, used.vertical)
    horizontal, vertical = (_inverted(g, low=low, high=high) for g, (low, high) in zip(gradients, ranges, strict=True))
    return cv2.magnitude(horizontal, vertical)


def _inverted(gradient: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """1 where the gradient is at its lowest, 0 where at its highest; all 1 where it is constant, as OpenCV has it."""
    span = high - low
    if span <= np.finfo(np.float64).eps:
        return np.ones_like(gradient)
    return np.clip(1 - (gradient - low) * np.float32(1 / span), 0, 1)


def _markers(edges: np.ndarray, *, opened: np.ndarray) -> np.ndarray:
    """One label a marker, int32 [H, W]: parts of the opened mask away from edges, their holes filled."""
    away = ((edges < _EDGE_THRESHOLD) & (opened > 0)).view(np.uint8)
    padded = cv2.copyMakeBorder(away, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(padded, None, (0, 0), 2)  # what is left 0 cannot be reached from outside: holes
    filled = (padded[1:-1, 1:-1] != 2).view(np.uint8)
    return cv2.connectedComponents(filled, connectivity=4)[1]


def _divided(piece: np.ndarray, *, markers: np.ndarray, relief: np.ndarray, opened: np.ndarray) -> list[np.ndarray]:
    """The nuclei, each a non-empty bool [h, w], of one connected piece of the mask."""
    ids = np.unique(markers)
    ids = ids[ids > 0]
    if len(ids) < 2:
        return [piece]
    cells = watershed(relief, markers=markers, mask=opened)
    return [cell for cell in (cells == i for i in ids) if cell.any()]


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
        if np.count_nonzero(cell) < min_area_px:
            continue
        contours.append(_simplified(outer_contour(cell, x0_px=box[1].start, y0_px=box[0].start), simplify=simplify))
    return _nuclei(contours)


def outer_contour(cell: np.ndarray, *, x0_px: int, y0_px: int) -> np.ndarray:
    """Longest outer contour of a non-empty bool [h, w] crop, as int32 [N, 1, 2] in the frame of the region."""
    contours, _ = cv2.findContours(
        cell.view(np.uint8) if cell.dtype == bool else cell,
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_SIMPLE,
        offset=(x0_px, y0_px),
    )
    return contours[0] if len(contours) == 1 else max(contours, key=cv2.contourArea)


def _simplified(contour: np.ndarray, *, simplify: float) -> np.ndarray:
    if simplify == 0:
        return contour
    return cv2.approxPolyDP(contour, simplify * cv2.arcLength(contour, closed=True), closed=True)


def _nuclei(contours: Sequence[np.ndarray]) -> list[Nucleus]:
    """Int contours [N, 1, 2] to nuclei; self-intersecting ones are repaired, those without an area dropped."""
    points = [contour[:, 0, :] for contour in contours if len(contour) >= 3]
    if not points:
        return []
    index = np.repeat(np.arange(len(points)), [len(p) for p in points])
    valid = shapely.is_valid(shapely.polygons(shapely.linearrings(np.concatenate(points), indices=index)))
    nuclei = []
    for ring, is_valid in zip(points, valid, strict=True):
        contour_px = (ring if is_valid else _repaired(ring)).astype(np.float32)
        moments = cv2.moments(contour_px)
        if len(contour_px) < 3 or moments["m00"] == 0:
            continue
        x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
        nuclei.append(Nucleus(contour_px, (float(np.floor(2 * x) / 2), float(np.floor(2 * y) / 2))))
    return nuclei


def _repaired(ring: np.ndarray) -> np.ndarray:
    """Exterior of the largest polygon of a self-intersecting ring, float [N, 2]; empty where there is none."""
    parts = shapely.get_parts(shapely.make_valid(shapely.polygons(ring)), return_index=False)
    parts = shapely.get_parts(parts)  # a collection may hold multipolygons
    areas = shapely.area(parts)
    if len(parts) == 0 or areas.max() == 0:
        return np.empty((0, 2))
    return shapely.get_coordinates(shapely.get_exterior_ring(parts[areas.argmax()]))[:-1]
