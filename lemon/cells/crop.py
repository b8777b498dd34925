"""Nuclei of a region to rows of the cells table: crops, measurements, polygons, and who owns a nucleus at a seam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import shapely
from skimage.color import hed_from_rgb

from lemon import schema
from lemon.cells.select import rank_of
from lemon.nuclei.instances import Nucleus
from lemon.schema import CELL_MPP, CELL_PX
from lemon.slides.cohort import Slide
from lemon.slides.quality import focus_of_crops
from lemon.slides.tiles import Region
from lemon.slides.tissue import optical_density

SEAM_PX = 4
"""Base px on both sides of an inner border within which either region may claim a nucleus: the two regions may see its
centroid on different sides of the border. The first claim holds, see ``lemon.cells.shard``."""

ROWS = pa.schema([field for field in schema.CELLS if field.name not in (schema.FOCUS, "image")])
"""The cells table without its images and what is measured of them."""

# Weights that give the hematoxylin part of an RGB optical density: first column of the inverse stain matrix
# (Ruifrok and Johnston 2001, as scikit-image has it, there for natural logarithms of values over 1e-6).
_HEMATOXYLIN = hed_from_rgb[:, 0].astype(np.float32)


@dataclass(frozen=True)
class Frame:
    """Where a slide's pixels lie: all that cells need to know of it; picklable."""

    slide: Slide
    mpp: float
    scale: float  # level-0 px a base px
    bounds_px: tuple[int, int, int, int]  # x, y, width, height of the scanned area in base px
    seam_px: int = SEAM_PX  # 0 where a nucleus has one centroid for all regions


@dataclass(frozen=True)
class Claims:
    """The nuclei that one region claims, N of them, of which K have crops."""

    rows: pa.Table  # [N] rows of ROWS
    centroid_px: np.ndarray  # [N, 2] float64, x, y in base px
    contested: np.ndarray  # [N] bool: within SEAM_PX of the inner border
    at_edge: np.ndarray  # [N] bool: the crop reaches over the slide's edge
    kept: np.ndarray  # [K] indices into the rows
    images: np.ndarray  # [K, 60, 60, 3] uint8
    focus: np.ndarray  # [K], see ``lemon.slides.quality.focus_of_crops``; NaN where it cannot be told


def claim_cells(
    image: np.ndarray, nuclei: Sequence[Nucleus], *, region: Region, frame: Frame, rank_below: float = 1.0
) -> Claims:
    """Rows of the nuclei whose centroid lies in the region's inner part (or within the frame's seam of it).

    Args:
        image: uint8 [H, W, 3], the region at 0.25 um/px.
        nuclei: in region px.
        region: where the image lies.
        frame: of the slide.
        rank_below: only nuclei of a lower rank get a crop.
    """
    offset = np.array([region.x_px, region.y_px], np.float64)
    centroid = np.array([nucleus.centroid_px for nucleus in nuclei], np.float64).reshape(-1, 2) + offset
    slide_box = _box(frame.bounds_px)
    mine = np.flatnonzero(_within(centroid, _grown(region.inner_px, frame.seam_px)) & _within(centroid, slide_box))
    ids, first = np.unique(_cell_ids(frame, centroid[mine]), return_index=True)
    mine = mine[first]  # two polygons with one centroid are one nucleus
    nuclei, centroid = [nuclei[index] for index in mine.tolist()], centroid[mine]
    rank = rank_of(ids)
    kept = np.flatnonzero(rank < rank_below)
    corner = corners_of(centroid)  # base px
    at_edge = ~(_within(corner, slide_box) & _within(corner + CELL_PX - 1, slide_box))
    images = cut_crops(image, corner[kept] - offset.astype(int))
    return Claims(
        rows=_rows(image, nuclei, ids=ids, rank=rank, centroid=centroid, offset=offset, frame=frame),
        centroid_px=centroid,
        contested=~_within(centroid, _grown(region.inner_px, -frame.seam_px)),
        at_edge=at_edge,
        kept=kept,
        images=images,
        focus=np.where(at_edge[kept], np.nan, focus_of_crops(images)),  # white beyond the edge is sharp
    )


def cut_crops(image: np.ndarray, corner_px: np.ndarray, *, side_px: int = CELL_PX) -> np.ndarray:
    """Squares out of an image [H, W, 3] by their top left corners int [N, 2] (x, y): uint8 [N, side, side, 3].

    What lies outside the image is white.
    """
    if len(corner_px) == 0:
        return np.empty((0, side_px, side_px, 3), np.uint8)
    high, wide = image.shape[:2]
    low = np.maximum(0, -corner_px.min(axis=0))
    over = np.maximum(0, corner_px.max(axis=0) + side_px - (wide, high))
    if low.any() or over.any():
        image = np.pad(image, ((low[1], over[1]), (low[0], over[0]), (0, 0)), constant_values=255)
        corner_px = corner_px + low
    windows = np.lib.stride_tricks.sliding_window_view(image, (side_px, side_px, 3))[:, :, 0]
    return windows[corner_px[:, 1], corner_px[:, 0]]


def crop_nuclei(image: np.ndarray, nuclei: Sequence[Nucleus] | np.ndarray) -> np.ndarray:
    """Images of nuclei as ``Encoder.embed`` takes them: uint8 [N, 60, 60, 3] at 0.25 um/px, white beyond the image.

    Args:
        image: uint8 [H, W, 3], RGB at 0.25 um/px.
        nuclei: N nuclei of the image (``lemon.segment``), or their centroids [N, 2], (x, y) in px of the image with
            whole numbers at pixel centres.

    Raises:
        ValueError: the image or the centroids are of another type or shape, or a centroid lies outside the image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image: got {image.dtype} {list(image.shape)}; expected RGB at 0.25 um/px, uint8 [H, W, 3]")
    centroids = nuclei if isinstance(nuclei, np.ndarray) else [nucleus.centroid_px for nucleus in nuclei]
    centroid = (
        np.asarray(centroids, np.float64).reshape(-1, 2) if len(centroids) == 0 else np.asarray(centroids, np.float64)
    )
    if centroid.ndim != 2 or centroid.shape[1] != 2:
        raise ValueError(f"nuclei: got an array {list(centroid.shape)}; expected centroids [N, 2], (x, y)")
    high, wide = image.shape[:2]
    outside = ~_within(centroid, (0, 0, wide, high))
    if outside.any():  # NaN too
        x, y = centroid[outside][0]
        raise ValueError(f"nuclei: got a centroid at ({x:g}, {y:g}); expected px of the image, {wide} x {high}")
    return cut_crops(image, corners_of(centroid))


def corners_of(centroid_px: np.ndarray, *, side_px: int = CELL_PX) -> np.ndarray:
    """Top left px int [N, 2] of the crops around centroids [N, 2], (x, y)."""
    return np.round(centroid_px - (side_px - 1) / 2).astype(int)


def measure(image: np.ndarray, nuclei: Sequence[Nucleus]) -> dict[str, np.ndarray]:
    """Area (um2), eccentricity, solidity and mean hematoxylin density of nuclei in an image [H, W, 3]: float32 [N].

    Eccentricity is that of the ellipse with the polygon's second moments; solidity is area over that of the convex
    hull; density is the hematoxylin part of -log10(value / 255) after Ruifrok and Johnston, meaned over the polygon.
    """
    high, wide = image.shape[:2]
    label_map = np.zeros((high, wide), np.int32)
    eccentricity, solidity = np.zeros(len(nuclei), np.float32), np.ones(len(nuclei), np.float32)
    for index, nucleus in enumerate(nuclei):
        contour = nucleus.contour_px.astype(np.float32)
        cv2.fillPoly(label_map, [np.round(contour).astype(np.int32)], index + 1)
        eccentricity[index] = _eccentricity(cv2.moments(contour))
        hull_px = cv2.contourArea(cv2.convexHull(contour))
        solidity[index] = cv2.contourArea(contour) / hull_px if hull_px else 1.0
    inside = label_map > 0
    owner = label_map[inside]
    area_px = np.bincount(owner, minlength=len(nuclei) + 1)[1:]
    density = optical_density(image[inside]) @ _HEMATOXYLIN
    total = np.bincount(owner, weights=density, minlength=len(nuclei) + 1)[1:]
    return {
        "area_um2": (area_px * CELL_MPP**2).astype(np.float32),
        "eccentricity": eccentricity,
        "solidity": np.minimum(solidity, 1),
        "hematoxylin_od_mean": (total / np.maximum(area_px, 1)).astype(np.float32),
    }


def to_level0(points_px: np.ndarray, scale: float) -> np.ndarray:
    """Base px (whole numbers at pixel centres) to level-0 px (whole numbers at pixel corners, as QuPath draws)."""
    return (points_px + 0.5) * scale


def _rows(
    image: np.ndarray,
    nuclei: Sequence[Nucleus],
    *,
    ids: np.ndarray,
    rank: np.ndarray,
    centroid: np.ndarray,
    offset: np.ndarray,
    frame: Frame,
) -> pa.Table:
    slide, count = frame.slide, len(nuclei)
    position = to_level0(centroid, frame.scale)
    columns = {
        "cell_id": pa.array(ids, pa.string()),
        "slide_id": pa.repeat(pa.scalar(slide.slide_id, pa.string()), count),
        "patient_id": pa.repeat(pa.scalar(slide.patient_id, pa.string()), count),
        "organ": pa.repeat(pa.scalar(slide.organ, pa.string()), count),
        "site": pa.repeat(pa.scalar(slide.site, pa.string()), count),
        "x_level0_px": position[:, 0],
        "y_level0_px": position[:, 1],
        "mpp": np.full(count, frame.mpp),
        **measure(image, nuclei),
        "polygon": _wkb([to_level0(nucleus.contour_px + offset, frame.scale) for nucleus in nuclei]),
        "rank": rank,
        **{name: [getattr(nucleus, name) for nucleus in nuclei] for name in schema.FOREIGN},
    }
    return pa.table(columns, schema=ROWS)


def _cell_ids(frame: Frame, centroid_px: np.ndarray) -> np.ndarray:
    """``<slide_id>_<x>_<y>``: the base px of the centroid, so that an id says where to look."""
    floored = np.floor(centroid_px).astype(int)
    return np.array([f"{frame.slide.slide_id}_{x}_{y}" for x, y in floored], dtype=object)


def _wkb(contours: Sequence[np.ndarray]) -> np.ndarray:
    if not contours:
        return np.empty(0, object)
    owner = np.repeat(np.arange(len(contours)), [len(contour) for contour in contours])
    rings = shapely.linearrings(np.concatenate(contours), indices=owner)  # closes them
    return np.array(shapely.to_wkb(shapely.polygons(rings)), object)


def _eccentricity(moments: dict[str, float]) -> float:
    if moments["m00"] <= 0:
        return 0.0
    xx, yy, xy = (moments[name] / moments["m00"] for name in ("mu20", "mu02", "mu11"))
    spread = np.hypot(xx - yy, 2 * xy)
    major, minor = xx + yy + spread, xx + yy - spread
    return float(np.sqrt(max(0.0, 1 - minor / major))) if major > 0 else 0.0


def _box(bounds_px: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    x, y, width, height = bounds_px
    return x, y, x + width, y + height


def _grown(box_px: tuple[int, int, int, int], by_px: int) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box_px
    return x0 - by_px, y0 - by_px, x1 + by_px, y1 + by_px


def _within(points_px: np.ndarray, box_px: tuple[int, int, int, int]) -> np.ndarray:
    """Which of [N, 2] points lie in a half-open box: bool [N]."""
    x0, y0, x1, y1 = box_px
    return np.all((points_px >= (x0, y0)) & (points_px < (x1, y1)), axis=1)
