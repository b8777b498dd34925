"""Nuclei by the hematoxylin stain alone: no weights, no training data at run time, one core.

The tissue is thresholded at many levels of local stain density. The connected pieces of all levels form a tree (each
piece lies in one piece of the level below), and every piece is scored for how much it looks like a nucleus: size,
ellipse fit, contrast, a closed edge, colour. The set of pieces that do not overlap and have the highest sum of scores
is kept. So touching nuclei part at the level where both halves look better than the whole, and no single threshold has
to serve a whole slide. The idea of choosing extremal regions in a tree by dynamic programming is that of Arteta et al.
(10.1007/978-3-642-33415-3_43); the score here is ten sigmoid gates instead of a learned kernel machine.

Everything is local: nothing reaches further than the largest nucleus or four sigmas of the local background (16 um),
and whatever is not local belongs to the slide's calibration. Regions that overlap by 128 px agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np
from scipy import ndimage

from lemon.nuclei.instances import Nucleus, polygons_from_labels

_OD = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)  # optical density of an 8-bit value
_GREEN_WEIGHT = 0.3  # density = red OD - 0.3 green OD: eosin absorbs green and hardly any red
_SMOOTHING_UM = 0.375
_BACKGROUND_UM = 4.0  # sigma of the local background
_LEVELS = np.linspace(0.0, 0.75, 20, dtype=np.float32)  # share of the slide's density range above the background
_HOLE_UM2 = 18.75  # vesicular nuclei are dark rings; holes up to this size are theirs
_MAX_AREA_UM2 = 275.0
_MAX_EXTENT_UM = 27.5
_MIN_PIECE_UM2 = 1.75  # smaller pieces are not scored
_WEAK_EDGE_PER_UM = 0.04  # share of the slide's density range per um
_INK_REDNESS = 0.42  # blue and green ink; of 22,000 hand-drawn nuclei none has a larger share of red in its density
_MIN_SCORE = 0.25
_GROWTH_UM = 1.5  # how far an outline may move out over stained pixels
_STAINED = 0.4  # density, as a share of the slide's range, of such pixels
_HULL_GROWTH = 1.6  # a hull larger than this many times its object is not the nucleus
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))


@dataclass(frozen=True)
class Calibration:
    """What the regions of one slide share: the stain density of pale tissue and of dark nuclei."""

    pale_od: float
    dark_od: float


@dataclass(frozen=True)
class Gate:
    """A sigmoid in one feature of a piece: 0.5 at ``middle``; a negative slope lets low values pass."""

    feature: str
    middle: float
    slope: float


GATES = (
    Gate("log_area", 2.14, 1.96),
    Gate("log_area", 5.71, -3.47),
    Gate("ellipse_fit", 0.874, 7.88),
    Gate("axis_ratio", 0.273, 11.4),
    Gate("contrast", 0.19, 15),
    Gate("edge_slope", -0.121, 13.3),
    Gate("weak_edge", 0.142, -47),
    Gate("redness", 0.208, 92.1),
    Gate("crowding", 0.0274, -119),
    Gate("growth", 1.99, -6.48),
)
SCALE = 1.28


class Hematoxylin:
    """Segmenter that needs no weights; the protocol is ``lemon.nuclei.segmenter.Segmenter``."""

    def __init__(self, *, min_area_um2: float = 5.0, min_score: float = _MIN_SCORE, um_per_px: float = 0.25) -> None:
        """Raises ValueError unless the area and the resolution are above 0 and the score is in [0, 1)."""
        if min_area_um2 <= 0:
            raise ValueError(f"min_area_um2: got {min_area_um2}, expected more than 0; 5 suits lymphocytes")
        if not 0 <= min_score < 1:
            raise ValueError(f"min_score: got {min_score}, expected 0 or more and less than 1; the default is 0.25")
        if um_per_px <= 0:
            raise ValueError(f"um_per_px: got {um_per_px}, expected more than 0; a 40x scan has about 0.25")
        self.min_area_um2, self.min_score, self.um_per_px = min_area_um2, min_score, um_per_px

    def calibrate(self, samples: Sequence[np.ndarray]) -> Calibration:
        """See :func:`calibrate`."""
        return calibrate(samples, um_per_px=self.um_per_px)

    def predict(self, regions: np.ndarray) -> list[None]:
        """One None a region of uint8 [B, H, W, 3]: there is no network."""
        return [None] * len(regions)

    @property
    def postprocess(self) -> Callable[[np.ndarray, None, Calibration], list[Nucleus]]:
        """Region uint8 [H, W, 3], None, calibration -> nuclei in region px; picklable."""
        return functools.partial(_nuclei, **vars(self))


def calibrate(samples: Sequence[np.ndarray], *, um_per_px: float = 0.25) -> Calibration:
    """Density range of one slide from some of its tissue regions, uint8 [H, W, 3] each.

    Pale is the 10th and dark the 98th percentile of stained pixels. Glass, pen and pixels without stain do not count;
    a slide without stain gets the range of an average one. Raises ValueError when there are no samples.
    """
    if len(samples) == 0:
        raise ValueError("samples: got none, expected at least one tissue region of the slide")
    stained = np.concatenate([_stained_densities(_checked(sample), um_per_px=um_per_px) for sample in samples])
    if len(stained) < 100:
        return Calibration(pale_od=0.15, dark_od=0.75)
    pale, dark = np.percentile(stained, (10, 98))
    # A range under 0.15 is that of stain without nuclei: widening it keeps noise from being read as nuclei.
    return Calibration(pale_od=float(pale), dark_od=float(max(dark, pale + 0.15)))


def segment(
    region: np.ndarray,
    *,
    calibration: Calibration,
    min_area_um2: float = 5.0,
    min_score: float = _MIN_SCORE,
    um_per_px: float = 0.25,
) -> np.ndarray:
    """Instance map int32 [H, W] of a region uint8 [H, W, 3]; 0 is background.

    The calibration is the slide's, from :func:`calibrate`. Objects below the smallest area are dropped, and pieces that
    score lower than ``min_score``, on a scale of 0 to 1, are not nuclei. Raises ValueError for any other kind of array.
    """
    height, width = _checked(region).shape[:2]
    # Work goes on in quarters of the region's pixels, the local background in sixteenths: whole multiples of 4.
    padded = cv2.copyMakeBorder(region, 0, -height % 4, 0, -width % 4, cv2.BORDER_REPLICATE)
    density, relief, pieces, levels = candidates(padded, calibration=calibration, um_per_px=um_per_px)
    chosen = choose(score(pieces) - min_score, parents=pieces["parent"])
    labels = _paint(pieces, chosen=chosen, levels=levels)
    thresholds = np.concatenate([[np.inf], _LEVELS[pieces["level"][chosen]]]).astype(np.float32)
    labels = _sharpen(labels, relief=relief, thresholds=thresholds)
    labels = _grown(labels, over=(density > _STAINED) & (relief > 0), reach_px=round(_GROWTH_UM / um_per_px))
    labels = _convex(labels)
    return _without_small(labels, min_area_px=min_area_um2 / um_per_px**2)[:height, :width]


def _nuclei(region: np.ndarray, prediction: None, calibration: Calibration, **settings: float) -> list[Nucleus]:  # noqa: ARG001
    # Labels that are too small are gone already.
    return polygons_from_labels(segment(region, calibration=calibration, **settings), min_area_px=1)


def _checked(region: np.ndarray) -> np.ndarray:
    if region.ndim != 3 or region.shape[2] != 3 or region.dtype != np.uint8 or 0 in region.shape:
        raise ValueError(f"region: got {region.dtype} {region.shape}, expected uint8 [H, W, 3] (RGB), not empty")
    return region


# --- stain density ----------------------------------------------------------------------------------------------------


def _density(region: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Smoothed hematoxylin density, float32 [H, W], in optical density."""
    red, green = _OD[region[..., 0]], _OD[region[..., 1]]
    # Blue and green ink absorb far more red than green, stained tissue does not: what is over the line is not stain.
    density = np.minimum(red, 1.25 * green + 0.1) - _GREEN_WEIGHT * green
    return cv2.GaussianBlur(density, (0, 0), _SMOOTHING_UM / um_per_px)


def _stained_densities(sample: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Densities of every 16th pixel, less those of glass and pen, float32 [N]."""
    density = _density(sample, um_per_px=um_per_px)[::4, ::4]
    red, green, blue = (_OD[sample[::4, ::4, i]] for i in range(3))
    # Black ink is dark in blue too, where both stains are clear; blue and green ink absorb far more red than green.
    pen = ((blue > 1.4) | (red > 1.5 * green + 0.1)).view(np.uint8)
    near_pen = cv2.dilate(pen, _DISC) > 0  # smoothing carries ink over its edge
    return density[(density > 0.1) & ~near_pen]


def _half(image: np.ndarray) -> np.ndarray:
    """[H, W] -> [H / 2, W / 2] by averages of 2x2; exact for even sizes."""
    return cv2.resize(image, (image.shape[1] // 2, image.shape[0] // 2), interpolation=cv2.INTER_AREA)


def _local_background(density: np.ndarray, *, um_per_px: float) -> np.ndarray:
    """Gaussian mean of the surroundings, float32 [H, W]; made at a quarter of the resolution, where it is as smooth."""
    blurred = cv2.GaussianBlur(_half(_half(density)), (0, 0), _BACKGROUND_UM / (4 * um_per_px))
    return cv2.resize(blurred, (density.shape[1], density.shape[0]), interpolation=cv2.INTER_LINEAR)


# --- the tree of pieces -----------------------------------------------------------------------------------------------


def candidates(
    region: np.ndarray, *, calibration: Calibration, um_per_px: float = 0.25
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], list[np.ndarray]]:
    """Pieces of all levels of a region uint8 [H, W, 3], H and W multiples of 4.

    Returns:
        The density as a share of the slide's range, and the relief, which is how far it is above the local background:
        float32 [H, W] both; the features of the N pieces, [N] each, among them ``level``, ``label`` (in its level) and
        ``parent`` (row, or -1); and the label image of each level, int32 [H / 2, W / 2].
    """
    span = calibration.dark_od - calibration.pale_od
    density = (_density(region, um_per_px=um_per_px) - calibration.pale_od) / span
    relief = density - _local_background(density, um_per_px=um_per_px)
    small_um = 2 * um_per_px
    planes = _Planes.of(_half(density), region=region, small_um=small_um)
    small_relief = _half(relief)
    levels, tables = [], []
    for threshold in _LEVELS:
        mask = _filled(small_relief > threshold, hole_px=_HOLE_UM2 / small_um**2)
        labels, table = _pieces(mask, small_um=small_um)
        if len(table["area_um2"]):
            _measure(table, labels=labels, mask=mask, planes=planes, small_um=small_um)
        levels.append(labels)
        tables.append(table)
    return density, relief, _joined(tables, levels=levels), levels


@dataclass(frozen=True)
class _Planes:
    """What pieces are measured on, at half resolution."""

    density: np.ndarray  # float32 [h, w], share of the slide's range
    slope: np.ndarray  # float32 [h, w], its gradient per um
    redness: np.ndarray  # float32 [h, w], share of the red channel in the optical density

    @classmethod
    def of(cls, density: np.ndarray, *, region: np.ndarray, small_um: float) -> _Planes:
        # Sobel's weights sum to 8 for a slope of 1 a pixel.
        slope = cv2.magnitude(*(cv2.Sobel(density, cv2.CV_32F, 1 - d, d, ksize=3) for d in (0, 1))) / (8 * small_um)
        od = _OD[_half(region)]  # [h, w, 3]
        return cls(density=density, slope=slope, redness=od[..., 0] / (od.sum(-1) + 0.05))


def _filled(mask: np.ndarray, *, hole_px: float) -> np.ndarray:
    """Mask uint8 [h, w] with small holes closed and threads of one pixel cut. Both keep masks of levels nested."""
    _, holes, stats, _ = cv2.connectedComponentsWithStats((~mask).view(np.uint8), connectivity=8)
    is_hole = stats[:, cv2.CC_STAT_AREA] < hole_px
    is_hole[0] = True  # the mask itself
    return cv2.morphologyEx(is_hole[holes].view(np.uint8), cv2.MORPH_OPEN, _CROSS)


def _pieces(mask: np.ndarray, *, small_um: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Connected pieces of a size that a nucleus may have: labels int32 [h, w] from 1 to k, and their first features."""
    _, piece_labels, stats, centroids = cv2.connectedComponentsWithStats(mask, connectivity=4)
    area_um2 = stats[:, cv2.CC_STAT_AREA] * small_um**2
    extent_um = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(1) * small_um
    fits = (area_um2 >= _MIN_PIECE_UM2) & (area_um2 <= _MAX_AREA_UM2) & (extent_um <= _MAX_EXTENT_UM)
    fits[0] = False
    renumbered = np.where(fits, np.cumsum(fits), 0).astype(np.int32)
    x_px, y_px = centroids[fits].T
    return renumbered[piece_labels], {"area_um2": area_um2[fits], "x_px": x_px, "y_px": y_px}


def _measure(
    table: dict[str, np.ndarray], *, labels: np.ndarray, mask: np.ndarray, planes: _Planes, small_um: float
) -> None:
    """Add the features of the pieces of one level to their table."""
    k = len(table["area_um2"])
    inside = np.flatnonzero(labels)
    owner = labels.ravel()[inside] - 1

    def mean(values: np.ndarray, owners: np.ndarray = owner) -> np.ndarray:
        count = np.bincount(owners, minlength=k)
        return np.bincount(owners, values, minlength=k) / np.maximum(count, 1)

    y, x = np.divmod(inside, labels.shape[1])
    dx, dy = x - table["x_px"][owner], y - table["y_px"][owner]
    xx, yy, xy = mean(dx * dx) + 1 / 12, mean(dy * dy) + 1 / 12, mean(dx * dy)  # 1 / 12: a pixel is a square
    determinant = np.maximum(xx * yy - xy * xy, 1e-6)
    half_trace = (xx + yy) / 2
    split = np.sqrt(np.maximum(half_trace**2 - determinant, 0))
    table["log_area"] = np.log(table["area_um2"])
    # Area over that of the ellipse of the same second moments: 1 for an ellipse, less for anything ragged or bent.
    table["ellipse_fit"] = table["area_um2"] / small_um**2 / (4 * np.pi * np.sqrt(determinant))
    table["axis_ratio"] = np.sqrt((half_trace - split) / (half_trace + split))
    table["redness"] = mean(planes.redness.ravel()[inside])

    shape = labels.astype(np.float32)
    edge = np.flatnonzero((labels > 0) & (cv2.erode(shape, _CROSS) != shape))
    edge_owner = labels.ravel()[edge] - 1
    slope = planes.slope.ravel()[edge]
    table["edge_slope"] = mean(slope, edge_owner)
    table["weak_edge"] = mean(slope < _WEAK_EDGE_PER_UM, edge_owner)

    grown = cv2.dilate(shape, _DISC)
    ring = np.flatnonzero((grown > 0) & (labels == 0))
    ring_owner = grown.ravel()[ring].astype(np.int64) - 1
    density = planes.density.ravel()
    table["contrast"] = mean(density[inside]) - mean(density[ring], ring_owner)
    table["crowding"] = mean(mask.ravel()[ring], ring_owner)  # share of the ring that other pieces fill


def _joined(tables: list[dict[str, np.ndarray]], *, levels: list[np.ndarray]) -> dict[str, np.ndarray]:
    """One table of all levels, with ``level``, ``label``, ``parent`` and ``growth`` (log area ratio to the parent)."""
    full = [table for table in tables if len(table["area_um2"])]
    counts = np.array([len(table["area_um2"]) for table in tables])
    starts = np.concatenate([[0], np.cumsum(counts)])
    joined = {name: np.concatenate([table[name] for table in full]) for name in (full[0] if full else {})}
    joined["level"] = np.repeat(np.arange(len(tables)), counts)
    joined["label"] = np.concatenate([np.arange(1, n + 1) for n in counts])
    parents = [np.full(counts[0], -1)]
    for level, (lower, upper) in enumerate(pairwise(levels)):
        inside = np.flatnonzero(upper)
        one_pixel = np.zeros(counts[level + 1] + 1, np.int64)
        one_pixel[upper.ravel()[inside]] = inside
        below = lower.ravel()[one_pixel[1:]]
        parents.append(np.where(below > 0, starts[level] + below - 1, -1))
    joined["parent"] = np.concatenate(parents)
    if full:
        area = joined["log_area"]
        joined["growth"] = np.where(joined["parent"] >= 0, np.minimum(area[joined["parent"]] - area, 1.5), 1.5)
    return joined


def score(pieces: dict[str, np.ndarray], *, gates: Sequence[Gate] = GATES, scale: float = SCALE) -> np.ndarray:
    """How much each piece looks like a nucleus, float [N] in [0, 1]: the product of its gates.

    The gates are fitted to the IoU of pieces with hand-drawn nuclei by ``benchmarks/gates.py``.
    """
    if len(pieces["level"]) == 0:
        return np.zeros(0)
    passed = sum(-np.logaddexp(0, -gate.slope * (pieces[gate.feature] - gate.middle)) for gate in gates)
    return np.where(pieces["redness"] > _INK_REDNESS, 0.0, np.minimum(scale * np.exp(passed), 1.0))


# --- choosing and painting --------------------------------------------------------------------------------------------


def choose(gains: np.ndarray, *, parents: np.ndarray) -> np.ndarray:
    """Rows of the pieces, none inside another, whose gains have the highest sum; by dynamic programming on the tree."""
    best = gains.tolist()
    inner = [0.0] * len(best)  # what the pieces inside can give together
    parent = parents.tolist()
    for row in range(len(best) - 1, -1, -1):  # pieces of higher levels come later, so children come before parents
        best[row] = max(best[row], inner[row], 0.0)
        if parent[row] >= 0:
            inner[parent[row]] += best[row]
    covered = [False] * len(best)
    chosen = []
    for row, gain in enumerate(gains.tolist()):
        covered[row] = parent[row] >= 0 and covered[parent[row]]
        if not covered[row] and gain > 0 and gain > inner[row]:
            covered[row] = True
            chosen.append(row)
    return np.array(chosen, dtype=np.int64)


def _paint(pieces: dict[str, np.ndarray], *, chosen: np.ndarray, levels: list[np.ndarray]) -> np.ndarray:
    """Labels int32 [h, w], from 1 in the order of ``chosen``."""
    painted = np.zeros(levels[0].shape, np.int32)
    for level, labels in enumerate(levels):
        of_level = np.flatnonzero(pieces["level"][chosen] == level)
        renumbered = np.zeros(labels.max() + 1, np.int32)
        renumbered[pieces["label"][chosen[of_level]]] = of_level + 1
        painted = np.maximum(painted, renumbered[labels])  # chosen pieces do not overlap
    return painted


def _sharpen(labels: np.ndarray, *, relief: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Labels int32 [H, W] from half resolution: the outline is where the full relief crosses the label's own level."""
    upsampled = cv2.resize(labels.astype(np.float32), relief.shape[::-1], interpolation=cv2.INTER_NEAREST)
    core = cv2.erode(upsampled, _DISC)
    core[core != cv2.dilate(upsampled, _DISC)] = 0  # pixels near a border, of the label or between two, are open
    near = np.where(upsampled > 0, upsampled, cv2.dilate(upsampled, _CROSS)).astype(np.int32)
    return np.where((core > 0) | (relief > thresholds[near]), near, 0)


def _grown(labels: np.ndarray, *, over: np.ndarray, reach_px: int) -> np.ndarray:
    """Labels int32 [H, W] grown pixel by pixel over a mask, as far as the reach; where two meet the later one wins."""
    grown = labels.astype(np.float32)
    for _ in range(reach_px):
        grown = np.where((grown == 0) & over, cv2.dilate(grown, _CROSS), grown)
    return grown.astype(np.int32)


def _convex(labels: np.ndarray) -> np.ndarray:
    """Labels int32 [H, W] filled up to their convex hulls, as far as nothing else is there; nuclei are convex."""
    filled = labels.copy()
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        shape = (labels[box] == label).view(np.uint8)
        contours, _ = cv2.findContours(shape, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        hull = np.zeros_like(shape)
        cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(contours)), 1)
        if np.count_nonzero(hull) <= _HULL_GROWTH * np.count_nonzero(shape):
            view = filled[box]
            view[(hull > 0) & (view == 0)] = label
    return filled


def _without_small(labels: np.ndarray, *, min_area_px: float) -> np.ndarray:
    """Labels int32 [H, W] renumbered from 1, those of fewer pixels dropped."""
    keep = np.bincount(labels.ravel()) >= min_area_px
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
