"""Given nuclei laid over their slide: from a file's coordinates to regions, and whether they fit what is seen there.

What does not fit is refused with a guess at what would, and never mended in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import shapely

from lemon.nuclei.given.config import CellsFrom, read_alignment
from lemon.nuclei.given.fit import check_fit
from lemon.nuclei.given.layout import XENIUM_UM_PER_PX, Layout, is_inside
from lemon.nuclei.given.nuclei import CIRCLE_CORNERS, GivenError, GivenNuclei, circles, largest_polygons
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import Region

CHUNK = 1 << 16
"""Outlines that are polygons of shapely's at a time: one takes ten times the memory of its corners."""


@dataclass(frozen=True)
class PlacedNuclei:
    """Nuclei in base px (0.25 um/px, whole numbers at pixel centres), valid outlines, each within the slide."""

    points: np.ndarray
    starts: np.ndarray
    centroid: np.ndarray
    """float64 [N, 2], rounded down to half a pixel, as segmenters have it."""
    ids: pa.StringArray
    classes: pa.StringArray
    probability: np.ndarray
    notes: tuple[str, ...]

    def in_regions(self, regions: Sequence[Region]) -> dict[int, np.ndarray]:
        """The nuclei of each region that has any, by its index: int64 [n]. Inner parts of regions do not overlap."""
        if not regions or not len(self.centroid):
            return {}
        corners = np.array([region.inner_px[:2] for region in regions])
        origin, side = corners.min(axis=0), regions[0].inner_px[2] - regions[0].inner_px[0]
        index_at = {
            tuple(place): region.index
            for place, region in zip(((corners - origin) // side).tolist(), regions, strict=True)
        }
        places = np.floor((self.centroid - origin) / side).astype(np.int64)
        order = np.lexsort(places.T)
        ends = np.flatnonzero(np.any(np.diff(places[order], axis=0) != 0, axis=1)) + 1
        parts = ((index_at.get(tuple(places[part[0]].tolist())), part) for part in np.split(order, ends))
        return {index: np.sort(part) for index, part in parts if index is not None}


def place_nuclei(nuclei: GivenNuclei, reader: SlideReader, config: CellsFrom) -> PlacedNuclei:
    """Lay nuclei over their slide. Raises GivenError, one line, where they do not fit it."""
    layout = _layout(nuclei, reader, config)
    notes = [*nuclei.notes, *([f"nuclei read as {layout.unit}"] if layout.unit != "px of level 0" else [])]
    points = layout.apply(nuclei.points, reader, centred=nuclei.centred)
    if nuclei.outlined:
        points, sizes, centroid = settle(points, nuclei.starts)
    else:
        centroid, radius_px = points, config.radius_um / reader.mpp
        points, sizes = circles(centroid, radius_px), np.full(len(centroid), CIRCLE_CORNERS)
        notes.append(f"centroids alone: circles of {config.radius_um:g} um stand for outlines")
    real = np.isfinite(centroid).all(axis=1)
    if not real.any():
        raise GivenError("none of its outlines encloses an area, and none of its centroids is a place")
    if n_without := len(real) - int(real.sum()):
        notes.append(f"{n_without:,} without an outline that encloses an area are left out")
    inside = real & is_inside(centroid, reader)
    if outside := int(real.sum() - inside.sum()):
        notes.append(f"{outside:,} beyond the slide are left out")
    notes += check_fit(nuclei, reader, layout=layout, centroid=centroid[real])
    base = centroid / reader.scale - 0.5
    single = _first_of_each_px(base, inside)
    if n_twice := int(inside.sum()) - len(single):
        notes.append(f"{n_twice:,} have their centroid in the pixel of another and are left out")
    at = np.repeat(_starts(sizes)[:-1][single], sizes[single]) + counting(sizes[single])
    return PlacedNuclei(
        points=points[at] / reader.scale - 0.5,
        starts=_starts(sizes[single]),
        centroid=np.floor(2 * base[single]) / 2,
        ids=nuclei.ids.take(pa.array(single)),
        classes=nuclei.classes.take(pa.array(single)),
        probability=nuclei.probability[single],
        notes=tuple(notes),
    )


def settle(points: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outlines as valid polygons: points [W, 2], corners of each outline [N], centroids [N, 2].

    Of an outline that crosses itself the largest part is kept; one that encloses no area has no corner, and NaN as its
    centroid.
    """
    parts = []
    for first in range(0, len(starts) - 1, CHUNK):
        bounds = starts[first : first + CHUNK + 1]
        parts.append(_settle_some(points[bounds[0] : bounds[-1]], np.diff(bounds)))
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


def _settle_some(points: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``settle`` of outlines that are held as shapely's polygons at once."""
    if not len(points):
        return points, np.zeros(len(sizes), np.int64), np.full((len(sizes), 2), np.nan)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    broken = np.bincount(owner, weights=~np.isfinite(points).all(axis=1), minlength=len(sizes)) > 0
    ends = _starts(sizes)
    last_px = np.maximum(ends[1:] - 1, 0)
    closed = np.all(points[np.minimum(ends[:-1], len(points) - 1)] == points[last_px], axis=1)
    drawn = np.flatnonzero((sizes - closed >= 3) & ~broken)
    polygons = np.full(len(sizes), None, object)
    if len(drawn):
        used = np.isin(owner, drawn)
        ring_of = np.searchsorted(drawn, owner[used])
        polygons[drawn] = shapely.polygons(shapely.linearrings(points[used], indices=ring_of))
    invalid = np.flatnonzero(~shapely.is_valid(polygons) & shapely.is_geometry(polygons))
    if len(invalid):
        polygons[invalid] = largest_polygons(shapely.make_valid(polygons[invalid]))
    polygons[~(shapely.area(polygons) > 0)] = None
    rings = shapely.get_exterior_ring(polygons)
    corners, of = shapely.get_coordinates(rings, return_index=True)
    last = np.append(np.diff(of) != 0, True)[: len(of)]  # where a ring closes
    sizes = np.bincount(of[~last], minlength=len(sizes))
    centroid = shapely.centroid(polygons)
    return corners[~last], sizes, np.stack([shapely.get_x(centroid), shapely.get_y(centroid)], axis=1)


def _layout(nuclei: GivenNuclei, reader: SlideReader, config: CellsFrom) -> Layout:
    """The coordinates as the settings say, or as the file's format has them."""
    unit, scale = nuclei.unit, nuclei.scale
    if config.mpp is not None:
        unit, scale = f"px of {config.mpp:g} um", config.mpp / reader.mpp
    elif config.unit == "um":
        unit, scale = "um", 1 / reader.mpp
    elif config.unit == "px" or config.level is not None:
        level = config.level or 0
        if level >= len(reader.level_downsamples):
            raise GivenError(f"cells_from.level={level} is none of the slide's; it has {len(reader.level_downsamples)}")
        unit, scale = f"px of level {level}", reader.level_downsamples[level]
    to_slide = None
    if config.alignment is not None:
        to_px = np.diag([reader.mpp / XENIUM_UM_PER_PX] * 2 + [1])
        to_slide = np.linalg.inv(np.array(read_alignment(config.alignment))) @ to_px
        unit += ", aligned"
    return Layout(unit, scale, config.flip, config.offset_px, to_slide=to_slide)


def _first_of_each_px(base: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Indices, rising, of one nucleus a base px among those inside: ids of cells are made of it."""
    candidates = np.flatnonzero(inside)
    places = np.floor(np.floor(2 * base[candidates]) / 2).astype(np.int64)
    key = places[:, 0] * (1 << 32) + places[:, 1]
    return np.sort(candidates[np.unique(key, return_index=True)[1]])


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def counting(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the sizes, end to end."""
    return np.arange(sizes.sum()) - np.repeat(_starts(sizes)[:-1], sizes)
