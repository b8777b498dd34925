"""What can be measured of a nucleus that a person can read: shape, stain, texture of chromatin, and how crowded it is.

All is computed from the cells table alone, by arrays of nuclei: shape from the outline, stain and texture from the
crop inside the outline, the neighbourhood from the centroids of all nuclei of a slide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import shapely
from scipy.spatial import cKDTree
from skimage.color import hed_from_rgb

from lemon import schema
from lemon.cells.crop import corners_of
from lemon.cells.shard import images_from_arrow
from lemon.schema import CELL_MPP, CELL_PX
from lemon.slides.tissue import optical_density

RING_PX = 8  # 2 um
NEIGHBOURS = 5
DENSITY_RADIUS_UM = 50.0
GREY_LEVELS, MAX_OD = 16, 1.5


@dataclass(frozen=True)
class Measure:
    """A measure: its column, what it is called, its unit ("" for a number without one), and what it is."""

    column: str
    name: str
    unit: str
    meaning: str


SHAPE = (
    Measure("area_um2", "area", "um2", "area inside the outline"),
    Measure("perimeter_um", "perimeter", "um", "length of the outline"),
    Measure("major_axis_um", "long axis", "um", "long axis of the ellipse with the outline's second moments"),
    Measure("minor_axis_um", "short axis", "um", "short axis of that ellipse"),
    Measure("eccentricity", "eccentricity", "", "of that ellipse: 0 is a circle, 1 a line"),
    Measure("solidity", "solidity", "", "area over that of the convex hull: 1 without a dent"),
    Measure("circularity", "circularity", "", "4 pi area / perimeter^2: 1 is a circle"),
)

STAIN = (
    Measure("hematoxylin_od_mean", "hematoxylin", "OD", "mean optical density of hematoxylin in the nucleus"),
    Measure("hematoxylin_od_sd", "spread of hematoxylin", "OD", "standard deviation of it"),
    Measure("hematoxylin_od_contrast", "hematoxylin against the ring", "OD", "its mean less that of a ring of 2 um"),
    Measure("eosin_od_mean", "eosin", "OD", "mean optical density of eosin in the nucleus"),
)

TEXTURE = (
    Measure("gradient_od_um", "steepness of chromatin", "OD/um", "mean slope of hematoxylin's density"),
    Measure("glcm_contrast", "contrast of texture", "", "mean squared step of grey levels between pixels 0.5 um apart"),
    Measure("glcm_homogeneity", "evenness of texture", "", "1 where neighbouring pixels have one grey level"),
    Measure("glcm_correlation", "correlation of texture", "", "correlation of grey levels of those pixels"),
    Measure("glcm_entropy", "disorder of texture", "bit", "entropy of pairs of grey levels"),
)

NEIGHBOURHOOD = (
    Measure("nearest_um", "nearest nucleus", "um", "distance of centroids"),
    Measure("nearest_5_um", "five nearest nuclei", "um", "mean distance to them"),
    Measure("density_per_mm2", "nuclei around", "1/mm2", "nuclei within 50 um, itself too; less at an edge"),
)

FOCUS = Measure(schema.FOCUS, "focus", "", "log2 of fine over coarse detail in the image; out of focus below -2.4")

MEASURES = (*SHAPE, *STAIN, *TEXTURE, *NEIGHBOURHOOD, FOCUS)
"""All measures. Those of ``STORED`` are columns of the cells table; the others are computed here."""

STORED = (*schema.MORPHOMETRICS, schema.FOCUS)

COMPUTED = tuple(measure for measure in MEASURES if measure.column not in STORED)

COLUMNS = ("cell_id", "x_level0_px", "y_level0_px", "mpp", *STORED, "polygon", "image")
"""Of the cells table, what ``measure_cells`` asks for."""

_HEMATOXYLIN, _EOSIN = (hed_from_rgb[:, stain].astype(np.float32) for stain in (0, 1))
_OFFSETS = ((0, 2), (1, 1), (2, 0), (1, -1))  # scikit-image's graycomatrix at distance 2: 0, 45, 90, 135 degrees


def measure_cells(rows: pa.Table) -> dict[str, np.ndarray]:
    """Shape, stain and texture of nuclei, float32 [N] a column of ``COMPUTED``, but for the neighbourhood.

    Stains are separated after Ruifrok and Johnston (2001), by scikit-image's matrix; densities are -log10. Texture is
    of hematoxylin's density in 16 grey levels between 0 and 1.5, by co-occurrence (Haralick 1973) of pixels of the
    nucleus that are 2 px apart, in four directions. A nucleus that has no pixel in its crop has NaN.

    Args:
        rows: N rows with ``COLUMNS``.
    """
    images = images_from_arrow(rows["image"])
    polygons = shapely.from_wkb(rows["polygon"].to_numpy(zero_copy_only=False))
    mpp = rows["mpp"].to_numpy()
    shape = _shape(polygons, mpp)
    place = np.stack([rows["x_level0_px"].to_numpy(), rows["y_level0_px"].to_numpy()], axis=1)
    inside, ring = _masks(polygons, place * (mpp / CELL_MPP)[:, None] - 0.5, mpp)
    density = optical_density(images)
    hematoxylin, eosin = density @ _HEMATOXYLIN, density @ _EOSIN
    mean = _mean(hematoxylin, inside)
    squared = _mean(hematoxylin**2, inside) - mean**2
    rise, run = np.gradient(hematoxylin, axis=(1, 2))
    values = shape | {
        "hematoxylin_od_sd": np.sqrt(np.maximum(squared, 0)),
        "hematoxylin_od_contrast": mean - _mean(hematoxylin, ring),
        "eosin_od_mean": _mean(eosin, inside),
        "gradient_od_um": _mean(np.hypot(rise, run), inside) / CELL_MPP,
    }
    values |= texture(hematoxylin, inside)
    return {name: column.astype(np.float32) for name, column in values.items()}


def neighbourhood(place_um: np.ndarray) -> dict[str, np.ndarray]:
    """Distances to neighbours (um) and density (1/mm2) of all nuclei of a slide [N, 2]: float32 [N] a column.

    NaN where there are not as many neighbours.
    """
    count = len(place_um)
    tree = cKDTree(place_um)
    distance = np.full((count, NEIGHBOURS + 1), np.nan)
    known = min(count, NEIGHBOURS + 1)
    if count:
        distance[:, :known] = tree.query(place_um, k=known)[0].reshape(count, known)
    around = tree.query_ball_point(place_um, DENSITY_RADIUS_UM, return_length=True) if count else np.empty(0)
    area_mm2 = np.pi * (DENSITY_RADIUS_UM / 1000) ** 2
    values = {
        "nearest_um": distance[:, 1],
        "nearest_5_um": distance[:, 1:].mean(axis=1),
        "density_per_mm2": around / area_mm2,
    }
    return {name: column.astype(np.float32) for name, column in values.items()}


def _shape(polygons: np.ndarray, mpp: np.ndarray) -> dict[str, np.ndarray]:
    """From the outlines in level-0 px."""
    area, perimeter = shapely.area(polygons), shapely.length(polygons)
    xx, yy, xy = _second_moments(polygons)
    spread = np.hypot(xx - yy, 2 * xy)
    with np.errstate(divide="ignore", invalid="ignore"):
        circularity = np.minimum(4 * np.pi * area / perimeter**2, 1)
    return {
        "perimeter_um": perimeter * mpp,
        "major_axis_um": np.sqrt(np.maximum(8 * (xx + yy + spread), 0)) * mpp,
        "minor_axis_um": np.sqrt(np.maximum(8 * (xx + yy - spread), 0)) * mpp,
        "circularity": circularity,
    }


def _second_moments(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Central second moments over area (xx, yy, xy) of polygons without holes: float64 [N] each, by Green's theorem."""
    points, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    count = len(polygons)
    first = points[np.searchsorted(owner, np.arange(count)).clip(0, max(len(points) - 1, 0))] if len(points) else points
    points = points - first[owner]  # near the origin: large coordinates would cancel
    x, y = points.T
    follows = np.flatnonzero(owner[1:] == owner[:-1])
    of = owner[follows]
    x0, y0, x1, y1 = x[follows], y[follows], x[follows + 1], y[follows + 1]
    cross = x0 * y1 - x1 * y0

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(of, weights=values, minlength=count)

    with np.errstate(divide="ignore", invalid="ignore"):
        area = total(cross) / 2
        centre_x, centre_y = total((x0 + x1) * cross) / (6 * area), total((y0 + y1) * cross) / (6 * area)
        xx = total((x0 * x0 + x0 * x1 + x1 * x1) * cross) / (12 * area) - centre_x**2
        yy = total((y0 * y0 + y0 * y1 + y1 * y1) * cross) / (12 * area) - centre_y**2
        xy = total((x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) * cross) / (24 * area) - centre_x * centre_y
    return xx, yy, xy


def _masks(polygons: np.ndarray, centre_base: np.ndarray, mpp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each crop in the nucleus, and in a ring of 2 um around it: bool [N, 60, 60] each."""
    points, owner = shapely.get_coordinates(shapely.get_exterior_ring(polygons), return_index=True)
    local = points * (mpp / CELL_MPP)[owner][:, None] - 0.5 - corners_of(centre_base)[owner]
    local = np.round(local).astype(np.int32)
    inside, grown = (np.zeros((len(polygons), CELL_PX, CELL_PX), np.uint8) for _ in range(2))
    outlines = np.split(local, np.searchsorted(owner, np.arange(1, len(polygons))))
    for index, outline in enumerate(outlines):
        if len(outline):
            cv2.fillPoly(inside[index], [outline], 1)
            cv2.dilate(inside[index], _RING, dst=grown[index])
    return inside.view(bool), (grown > inside)


_RING = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * RING_PX + 1, 2 * RING_PX + 1))


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean of [N, H, W] over a mask: float64 [N], NaN where the mask is empty."""
    total = np.einsum("nhw,nhw->n", values, mask, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: np.ndarray = total / mask.sum(axis=(1, 2))
    return mean


def texture(density: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Co-occurrence measures of [N, H, W] within masks: float64 [N] each; as scikit-image's graycoprops has them."""
    count, levels = len(density), GREY_LEVELS
    grey = (np.clip(density / MAX_OD, 0, 1) * levels).astype(np.int32).clip(0, levels - 1)
    pairs = np.zeros((count, levels, levels))
    for (first, second), valid in _neighbours(grey, inside):
        owner = np.nonzero(valid)[0]
        key = (owner * levels + first[valid]) * levels + second[valid]
        pairs += np.bincount(key, minlength=pairs.size).reshape(pairs.shape)
    pairs = pairs + pairs.transpose(0, 2, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = pairs / pairs.sum(axis=(1, 2), keepdims=True)
        step = np.subtract.outer(np.arange(levels), np.arange(levels))
        middle = np.einsum("nij,i->n", share, np.arange(levels))
        variance = np.einsum("nij,i->n", share, np.arange(levels) ** 2) - middle**2
        together = np.einsum("nij,i,j->n", share, np.arange(levels), np.arange(levels)) - middle**2
        return {
            "glcm_contrast": np.einsum("nij,ij->n", share, step**2),
            "glcm_homogeneity": np.einsum("nij,ij->n", share, 1 / (1 + step**2)),
            "glcm_correlation": np.where(variance > 1e-12, together / variance, np.where(np.isnan(middle), np.nan, 1)),
            "glcm_entropy": -np.sum(share * np.log2(np.where(share > 0, share, 1)), axis=(1, 2)),
        }


def _neighbours(grey: np.ndarray, inside: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """Grey levels of pixels and of those beside them, a direction at a time, and where both are in the mask."""
    high, wide = grey.shape[1:]
    for dy, dx in _OFFSETS:
        rows, others = slice(0, high - dy), slice(dy, high)
        columns = slice(max(0, -dx), wide - max(0, dx))
        beside = slice(max(0, dx), wide - max(0, -dx))
        here, there = (slice(None), rows, columns), (slice(None), others, beside)
        yield (grey[here], grey[there]), inside[here] & inside[there]
