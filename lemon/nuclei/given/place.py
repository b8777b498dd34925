"""Given nuclei laid over their slide: from a file's coordinates to regions, and whether they fit what is seen there.

What does not fit is refused with a guess at what would, and never mended in silence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import pyarrow as pa
import shapely

from lemon.nuclei.given.config import CellsFrom, Flip, read_alignment
from lemon.nuclei.given.nuclei import CIRCLE_CORNERS, GivenError, GivenNuclei, circles, largest_polygons
from lemon.slides.errors import RegionError
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import Region
from lemon.slides.tissue import optical_density

XENIUM_UM_PER_PX = 0.2125
"""Of Xenium's images, which the matrix of an alignment leads to."""

MAX_OUTSIDE_SHARE = 0.01
"""Nuclei beyond the slide's edge up to here are left out, with a note; more are refused."""

_SAMPLES = 4
_SAMPLE_PX = 512
_BESIDE_PX = 32  # 8 um: outside of most nuclei, and not yet the next field
_SEEN, _UNSEEN = 6.0, 2.0  # standard errors: certainly nuclei; nothing to be seen
_ENOUGH = 30  # nuclei that a judgement takes
_MATCH_MPP = 4.0
_MAX_MATCH_PX = 1 << 26

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


@dataclass(frozen=True)
class Layout:
    """How a file's coordinates lie on a slide."""

    unit: str
    scale: float  # level-0 px a unit
    flip: Flip = "none"
    offset_px: tuple[float, float] = (0.0, 0.0)
    setting: str = ""  # what says so, for messages
    to_slide: np.ndarray | None = None  # [3, 3], of level-0 px, before the flip

    def apply(self, points: np.ndarray, reader: SlideReader, *, centred: bool) -> np.ndarray:
        """Points of a file [V, 2] in level-0 px, whole numbers at pixel corners."""
        points = (points + 0.5 if centred else points) * self.scale
        if self.to_slide is not None:
            points = points @ self.to_slide[:2, :2].T + self.to_slide[:2, 2]
        if self.flip == "transpose":
            points = points[:, ::-1]
        elif self.flip != "none":
            size = np.array([reader.width_px, reader.height_px], float)
            runs_back = np.array([axis in self.flip for axis in "xy"])
            points = np.where(runs_back, size - points, points)
        return points + np.array(self.offset_px)


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
    inside = real & _inside(centroid, reader)
    if outside := int(real.sum() - inside.sum()):
        notes.append(f"{outside:,} beyond the slide are left out")
    notes += check_fit(nuclei, reader, layout=layout, centroid=centroid[real], share_outside=outside / real.sum())
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


def _inside(points: np.ndarray, reader: SlideReader) -> np.ndarray:
    """Which points [N, 2] lie in the scanned area: bool [N]; NaN does not."""
    x, y, width, height = reader.bounds_px
    return np.all((points >= (x, y)) & (points < (x + width, y + height)), axis=1)


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


# --- does it fit ------------------------------------------------------------------------------------------------------


def check_fit(
    nuclei: GivenNuclei, reader: SlideReader, *, layout: Layout, centroid: np.ndarray, share_outside: float
) -> list[str]:
    """Whether nuclei lie within the slide and on dark spots; notes where that cannot be told.

    Raises GivenError where many lie outside, or where they lie on nothing and another layout would fit.
    """
    seen = None if share_outside > MAX_OUTSIDE_SHARE else contrast(centroid, reader)
    if share_outside <= MAX_OUTSIDE_SHARE and (seen is None or seen > _UNSEEN):
        return []
    better = _better_layout(nuclei, reader, layout)
    hint = f"they fit with {better.setting}, which is not assumed: give it if it is so" if better else "nothing fits"
    if share_outside > MAX_OUTSIDE_SHARE:
        (x0, y0), (x1, y1) = centroid.min(axis=0), centroid.max(axis=0)
        raise GivenError(
            f"{share_outside:.0%} of its nuclei lie beyond the slide of {reader.width_px} x {reader.height_px} px: "
            f"read as {layout.unit}, they span {x0:.0f} to {x1:.0f} by {y0:.0f} to {y1:.0f} px of level 0; {hint}"
        )
    if better:
        raise GivenError(f"read as {layout.unit}, its nuclei do not lie on the slide's; {hint}")
    return ["nuclei are no darker than what is beside them: do they belong to this slide?"]


def contrast(centroid: np.ndarray, reader: SlideReader) -> float | None:
    """How much darker it is at centroids (level-0 px) than 8 um beside them, in standard errors; None for too few.

    The red channel is looked at, where hematoxylin absorbs and eosin hardly does, in up to four samples of 128 um.
    """
    differences = []
    for spots, density in _samples(centroid, reader):
        here = density[spots[:, 1], spots[:, 0]]
        beside = [
            density[np.clip(spots[:, 1] + dy, 0, _SAMPLE_PX - 1), np.clip(spots[:, 0] + dx, 0, _SAMPLE_PX - 1)]
            for dx, dy in _around(_BESIDE_PX)
        ]
        differences.append(here - np.mean(beside, axis=0))
    values = np.concatenate(differences) if differences else np.empty(0)
    if len(values) < _ENOUGH:
        return None
    return float(values.mean() / max(values.std() / np.sqrt(len(values)), 1e-6))


def _samples(centroid: np.ndarray, reader: SlideReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Centroids, int [n, 2] in px of a sample, and its optical density in red [512, 512], blurred over 1.25 um."""
    base = centroid[_inside(centroid, reader)] / reader.scale - 0.5
    if not len(base):
        return
    places = np.floor(base / _SAMPLE_PX).astype(np.int64)
    boxes, counts = np.unique(places, axis=0, return_counts=True)
    for x, y in (boxes[np.argsort(-counts, kind="stable")[:_SAMPLES]] * _SAMPLE_PX).tolist():
        try:
            image = reader.region(x, y, width_px=_SAMPLE_PX, height_px=_SAMPLE_PX)
        except RegionError:
            continue
        spots = np.clip(np.round(base - (x, y)), -1, _SAMPLE_PX).astype(np.int64)
        spots = spots[np.all((spots >= 0) & (spots < _SAMPLE_PX), axis=1)]
        yield spots, cv2.blur(optical_density(image[..., 0]), (5, 5))


def _around(distance: int) -> list[tuple[int, int]]:
    angles = np.arange(8) * np.pi / 4
    return [(round(distance * np.cos(angle)), round(distance * np.sin(angle))) for angle in angles]


def _better_layout(nuclei: GivenNuclei, reader: SlideReader, used: Layout) -> Layout | None:
    """The layout that puts the nuclei on dark spots, of those that people mean; None where none does."""
    centre = _means(nuclei)
    best: tuple[float, Layout] | None = None
    for layout in _candidates(reader, used):
        places = layout.apply(centre, reader, centred=nuclei.centred)
        if np.mean(~_inside(places, reader)) > MAX_OUTSIDE_SHARE:
            continue
        seen = contrast(places, reader) or 0.0
        if seen > _SEEN and (best is None or seen > best[0]):
            best = seen, layout
    return best[1] if best else _shifted(centre, reader, used, centred=nuclei.centred)


def _means(nuclei: GivenNuclei) -> np.ndarray:
    """Mean of each outline's corners: float64 [N, 2]; near enough to a centroid to look at."""
    drawn = nuclei.sizes > 0
    sums = np.add.reduceat(nuclei.points, nuclei.starts[:-1][drawn], axis=0)
    return sums / nuclei.sizes[drawn][:, None]


def _candidates(reader: SlideReader, used: Layout) -> Iterator[Layout]:
    """Layouts that differ from the one used in their scale, their flip, or by the corner of the scanned area."""
    scales = {f"cells_from.level={level}": scale for level, scale in enumerate(reader.level_downsamples)}
    scales |= {"cells_from.unit=um": 1 / reader.mpp}
    scales |= {f"cells_from.mpp={mpp:g}": mpp / reader.mpp for mpp in (0.25, 0.5, XENIUM_UM_PER_PX)}
    corner = reader.bounds_px[0], reader.bounds_px[1]
    flips: tuple[Flip, ...] = ("none", "y", "x", "xy", "transpose")
    kept: dict[str, float] = {"": used.scale}
    for setting, scale in scales.items():
        if all(abs(scale / other - 1) > 0.01 for other in kept.values()):
            kept[setting] = scale
    for setting, scale in kept.items():
        for flip in flips:
            for offset in dict.fromkeys([used.offset_px, corner]):
                layout = replace(used, unit=setting or used.unit, scale=scale, flip=flip, offset_px=offset)
                words = [setting] if setting else []
                words += [f"cells_from.flip={flip}"] if flip != used.flip else []
                words += [f"cells_from.offset_px=[{offset[0]:g},{offset[1]:g}]"] if offset != used.offset_px else []
                if words:
                    yield replace(layout, setting=" ".join(words))


def _shifted(centre: np.ndarray, reader: SlideReader, used: Layout, *, centred: bool) -> Layout | None:
    """The layout with an offset that puts the nuclei on dark spots; None where none does.

    Nuclei are matched with the slide's red density at 4 um/px by correlation, then pixel by pixel in a sample.
    """
    places = used.apply(centre, reader, centred=centred)
    try:
        picture, mpp = reader.overview(mpp=_MATCH_MPP)
    except RegionError:
        return None
    density = optical_density(picture[..., 0])
    step = mpp / reader.mpp  # level-0 px a px of the picture
    low = places.min(axis=0)
    raster_px = np.floor((places - low) / step).astype(np.int64)
    shape = np.array(density.shape) + raster_px.max(axis=0)[::-1] + 1
    if shape.prod() > _MAX_MATCH_PX:
        return None
    raster = np.zeros(raster_px.max(axis=0)[::-1] + 1)
    np.add.at(raster, (raster_px[:, 1], raster_px[:, 0]), 1)
    size = tuple(shape.tolist())
    spectrum = np.fft.rfft2(density - density.mean(), size) * np.conj(np.fft.rfft2(raster - raster.mean(), size))
    dy, dx = np.unravel_index(np.argmax(np.fft.irfft2(spectrum, size)), size)
    moved = np.array([dx if dx < density.shape[1] else dx - size[1], dy if dy < density.shape[0] else dy - size[0]])
    offset = moved * step + np.array(reader.bounds_px[:2]) - low
    offset = offset + _refined(places + offset, reader) * reader.scale
    final = places + offset
    if np.mean(~_inside(final, reader)) > MAX_OUTSIDE_SHARE or (contrast(final, reader) or 0.0) <= _SEEN:
        return None
    x, y = np.round(np.array(used.offset_px) + offset).tolist()
    return replace(used, offset_px=(x, y), setting=f"cells_from.offset_px=[{x:.0f},{y:.0f}]")


def _refined(places: np.ndarray, reader: SlideReader) -> np.ndarray:
    """By how many base px, up to 8 um, nuclei have to move to lie darkest: float64 [2]."""
    reach = range(-_BESIDE_PX, _BESIDE_PX + 1)
    total = np.zeros((len(reach), len(reach)))
    for spots, density in _samples(places, reader):
        for row, dy in enumerate(reach):
            y = np.clip(spots[:, 1] + dy, 0, _SAMPLE_PX - 1)
            for column, dx in enumerate(reach):
                total[row, column] += density[y, np.clip(spots[:, 0] + dx, 0, _SAMPLE_PX - 1)].sum()
    row, column = np.unravel_index(np.argmax(total), total.shape)
    return np.array([reach[column], reach[row]], float)
