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


@dataclass(frozen=True)
class Nucleus:
    """One nucleus in the frame of its region.

    ``centroid_px`` is the centroid of the polygon rounded down to half a pixel. HoverFast truncates it to whole
    pixels; half pixels stay within 1 px of its value and within 0.71 px of the exact one, and because regions start
    at whole pixels, a nucleus seen by two regions keeps the same centroid on the slide.
    """

    contour_px: np.ndarray  # [N, 2] float32, x, y in region pixels, N >= 3, first point not repeated
    centroid_px: tuple[float, float]  # x, y


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
        contours.append(_simplified(_outer_contour(cell, x0_px=box[1].start, y0_px=box[0].start), simplify=simplify))
    return _nuclei(contours)


def _outer_contour(cell: np.ndarray, *, x0_px: int, y0_px: int) -> np.ndarray:
    """Longest outer contour of a non-empty bool [h, w] crop, as int32 [N, 1, 2] in the frame of the region."""
    found, _ = cv2.findContours(
        cell.view(np.uint8) if cell.dtype == bool else cell,
        cv2.RETR_EXTERNAL,
        cv2.CHAIN_APPROX_SIMPLE,
        offset=(x0_px, y0_px),
    )
    return found[0] if len(found) == 1 else max(found, key=cv2.contourArea)


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
