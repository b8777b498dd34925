"""From per-pixel predictions or label images to one polygon a nucleus.

Coordinates are region pixels, x then y, with integers at pixel centres, as OpenCV's contours have them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.segmentation import watershed

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
    pieces = np.ascontiguousarray(mask != 0).view(np.uint8)
    opened = cv2.morphologyEx(pieces, cv2.MORPH_OPEN, _ELLIPSE, iterations=2)
    edges = _edges(gradients, limits=limits)
    piece_ids = cv2.connectedComponents(pieces, connectivity=4)[1]
    large = np.bincount(piece_ids[pieces.view(bool)]) >= min_area_px
    away = cv2.bitwise_and((edges < _EDGE_THRESHOLD).view(np.uint8), opened)
    crowded = _with_several(away, piece_ids)
    outlines = {piece_id: contour for piece_id, contour in _outlines(pieces, piece_ids) if large[piece_id]}
    contours = [(piece_id, contour) for piece_id, contour in outlines.items() if piece_id not in crowded]
    if len(contours) < len(outlines):
        crowds = {piece_id: contour for piece_id, contour in outlines.items() if piece_id in crowded}
        contours += _divided(crowds, piece_ids=piece_ids, away=away, edges=edges, opened=opened)
    contours.sort(key=lambda one: one[0])
    return _nuclei([_simplified(contour, simplify=_SIMPLIFY) for _, contour in contours], larger_than_px=min_area_px)


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


def _edges(gradients: np.ndarray, *, limits: HVLimits | None) -> np.ndarray:
    """Strength of the edges between nuclei, float32 [H, W] in [0, sqrt(2)]; of use inside the opened mask only."""
    own = hv_limits(gradients)
    used = limits or own
    return cv2.magnitude(_inverted(gradients[0], *used.horizontal), _inverted(gradients[1], *used.vertical))


def _inverted(gradient: np.ndarray, low: int, high: int) -> np.ndarray:
    """1 where the gradient is at its lowest, 0 where at its highest; all 1 where it is constant, as OpenCV has it."""
    if low >= high:
        return np.ones(gradient.shape, np.float32)
    within, scale = np.clip(gradient, low, high), 1 / (high - low)
    return cv2.addWeighted(within, -scale, within, 0, high * scale, dtype=cv2.CV_32F)


def _with_several(away: np.ndarray, piece_ids: np.ndarray) -> set[int]:
    """Pieces that hold two or more connected parts of what is away from edges, uint8 [H, W]."""
    at = np.flatnonzero(away)
    n_parts, parts = cv2.connectedComponents(away, connectivity=4)
    piece_of = np.zeros(n_parts, np.int64)
    piece_of[parts.ravel()[at]] = piece_ids.ravel()[at]  # a part lies inside one piece
    return set(np.flatnonzero(np.bincount(piece_of[1:]) > 1).tolist())


def _markers(away: np.ndarray) -> np.ndarray:
    """Label int32 [H, W] of each connected part, its holes filled, of uint8 [H, W], 0 or 1."""
    padded = cv2.copyMakeBorder(away, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(padded, None, (0, 0), 2)  # what is left 0 cannot be reached from outside: holes
    return cv2.connectedComponents((padded[1:-1, 1:-1] != 2).view(np.uint8), connectivity=4)[1]


def _outlines(pieces: np.ndarray, piece_ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The outer contour int32 [N, 1, 2] of every piece, all traced in one pass.

    Tracing joins pieces that touch at a corner, as connected pieces do not; those few are traced again one by one.
    """
    contours, hierarchy = cv2.findContours(pieces, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    joined = _joined_at_corners(pieces, piece_ids)
    for contour, parent in zip(contours, hierarchy[0, :, 3].tolist(), strict=True):
        if parent >= 0:  # a hole's
            continue
        x_px, y_px = contour[0, 0].tolist()
        piece_id = int(piece_ids[y_px, x_px])
        if piece_id not in joined:
            yield piece_id, contour
            continue
        x_px, y_px, w_px, h_px = cv2.boundingRect(contour)
        box = piece_ids[y_px : y_px + h_px, x_px : x_px + w_px]
        for member in joined[piece_id]:
            yield member, outer_contour(box == member, x0_px=x_px, y0_px=y_px)


def _joined_at_corners(pieces: np.ndarray, piece_ids: np.ndarray) -> dict[int, list[int]]:
    """Of each piece that touches one at a corner, all that hang together so, itself among them."""
    a, b, c, d = pieces[:-1, :-1], pieces[:-1, 1:], pieces[1:, :-1], pieces[1:, 1:]
    two_alike = np.flatnonzero((a + d - b - c) & 3 == 2)  # +2 or -2 in bytes: one diagonal full, the other empty
    if len(two_alike) == 0:
        return {}
    y, x = np.divmod(two_alike, a.shape[1])
    left = 1 - pieces[y, x]  # 1 where it is the diagonal from the right down to the left
    first, second = piece_ids[y, x + left], piece_ids[y + 1, x + 1 - left]
    n_ids = int(max(first.max(), second.max())) + 1
    touch = coo_array((np.ones(len(first), np.uint8), (first, second)), shape=(n_ids, n_ids))
    group_of = connected_components(touch, directed=False)[1]
    groups: dict[int, list[int]] = {}
    for piece_id in np.union1d(first, second).tolist():
        groups.setdefault(int(group_of[piece_id]), []).append(piece_id)
    return {piece_id: group for group in groups.values() for piece_id in group}


def _divided(
    outlines: dict[int, np.ndarray],
    *,
    piece_ids: np.ndarray,
    away: np.ndarray,
    edges: np.ndarray,
    opened: np.ndarray,
) -> Iterator[tuple[int, np.ndarray]]:
    """Divide pieces at their edges, in one watershed over a sheet on which their boxes lie side by side.

    Args:
        outlines: the outer contour of each piece.
        piece_ids: int32 [H, W].
        away: uint8 [H, W], 1 where a marker is.
        edges: float32 [H, W].
        opened: uint8 [H, W], 0 or 1.

    Yields:
        Piece and outer contour int32 [N, 1, 2] of each nucleus.
    """
    boxes = [cv2.boundingRect(outline) for outline in outlines.values()]
    corners, shape = _side_by_side([(h, w) for _, _, w, h in boxes], width=piece_ids.shape[1])
    places = [np.s_[y : y + h, x : x + w] for (y, x), (_, _, w, h) in zip(corners, boxes, strict=True)]
    relief, seeds, inside, index = (np.zeros(shape, kind) for kind in (np.float64, np.uint8, np.uint8, np.int32))
    for i, (piece_id, (x, y, w, h), place) in enumerate(zip(outlines, boxes, places, strict=True)):
        index[place] = i
        left, top = max(x - 1, 0), max(y - 1, 0)  # one pixel more on each side, for the blur
        around, box = np.s_[top : y + h + 1, left : x + w + 1], np.s_[y : y + h, x : x + w]
        blurred = cv2.GaussianBlur((1 - edges[around]) * opened[around], (3, 3), 0)
        np.negative(blurred[y - top : y - top + h, x - left : x - left + w], out=relief[place])
        piece = piece_ids[box] == piece_id
        np.multiply(opened[box], piece, out=inside[place])
        np.multiply(away[box], piece, out=seeds[place])
    cells = watershed(relief, markers=_markers(seeds), mask=inside)
    found = [(label, box) for label, box in enumerate(ndimage.find_objects(cells), start=1) if box is not None]
    owners = [int(index[box[0].start, box[1].start]) for _, box in found]
    n_cells, ids = np.bincount(owners, minlength=len(outlines)), list(outlines)
    yield from ((ids[i], outlines[ids[i]]) for i in np.flatnonzero(n_cells < 2).tolist())
    for (label, box), i in zip(found, owners, strict=True):
        if n_cells[i] > 1:
            x0_px, y0_px = (boxes[i][axis] + box[1 - axis].start - corners[i][1 - axis] for axis in (0, 1))
            yield ids[i], outer_contour(cells[box] == label, x0_px=x0_px, y0_px=y0_px)


def _side_by_side(sizes: Sequence[tuple[int, int]], *, width: int) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Where boxes of (height, width) lie on a sheet of a width, in rows, a pixel apart; and the sheet's shape."""
    corners, row, column, highest = [(0, 0)] * len(sizes), 0, 0, 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][0]):
        if column + sizes[i][1] > width:
            row, column, highest = row + highest + 1, 0, 0
        corners[i] = (row, column)
        column, highest = column + sizes[i][1] + 1, max(highest, sizes[i][0])
    return corners, (row + highest, width)


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
        cell.view(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x0_px, y0_px)
    )
    return contours[0] if len(contours) == 1 else max(contours, key=cv2.contourArea)


def _simplified(contour: np.ndarray, *, simplify: float) -> np.ndarray:
    if simplify == 0:
        return contour
    return cv2.approxPolyDP(contour, simplify * cv2.arcLength(contour, closed=True), closed=True)


def _nuclei(contours: Sequence[np.ndarray], *, larger_than_px: float = 0.0) -> list[Nucleus]:
    """Int contours [N, 1, 2] of more than an area to nuclei; self-intersecting ones are repaired."""
    rings = [contour[:, 0, :] for contour in contours if len(contour) >= 3]
    rings = [ring for ring, area in zip(rings, _moments(rings)[0], strict=True) if area > larger_than_px]
    if not rings:
        return []
    index = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    valid = shapely.is_valid(shapely.polygons(shapely.linearrings(np.concatenate(rings), indices=index)))
    rings = [ring if is_valid else _repaired(ring) for ring, is_valid in zip(rings, valid, strict=True)]
    rings = [ring for ring in rings if len(ring) >= 3]
    area, *centroid = _moments(rings)
    x, y = (np.floor(2 * along) / 2 for along in centroid)
    return [
        Nucleus(ring.astype(np.float32), (x_px, y_px))
        for ring, has_area, x_px, y_px in zip(rings, area > 0, x.tolist(), y.tolist(), strict=True)
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
