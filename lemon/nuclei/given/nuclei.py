"""What a file of nuclei says, in arrays: outlines end to end, ids, classes, and in which unit coordinates are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

CIRCLE_CORNERS = 16
_POINT, _POLYGON = 0, 3  # shapely's numbers of types


class GivenError(Exception):
    """A file of nuclei cannot be used; the message is one line that follows the file's name."""


@dataclass(frozen=True)
class GivenNuclei:
    """N nuclei of a file.

    Attributes:
        points: float64 [V, 2], x and y of all outlines' corners, end to end; in a table of centroids one a nucleus.
        starts: int64 [N + 1], where each outline begins among the points, and V.
        ids: string [N], as the file has them; where it has none, the place in the file, counted from 0.
        classes: string [N], null where there is none.
        probability: float32 [N], of the class or of the detection; NaN where there is none.
        unit: of the coordinates, in words.
        scale: level-0 px a unit of the coordinates.
        centred: whether whole numbers are the centres of pixels, as OpenCV's contours have it; else their corners.
        notes: lines on what was passed over or assumed.
    """

    points: np.ndarray
    starts: np.ndarray
    ids: pa.StringArray
    classes: pa.StringArray
    probability: np.ndarray
    unit: str = "px of level 0"
    scale: float = 1.0
    centred: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Corners of each outline: int64 [N]."""
        return np.diff(self.starts)

    @property
    def outlined(self) -> bool:
        """Whether there are outlines, not centroids alone."""
        return len(self.points) > len(self)

    @property
    def owner(self) -> np.ndarray:
        """The nucleus of each point: int64 [V]."""
        return np.repeat(np.arange(len(self)), self.sizes)


@dataclass
class Gathered:
    """Nuclei as they are read one after another."""

    outlines: list[np.ndarray] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    classes: list[str | None] = field(default_factory=list)
    probability: list[float] = field(default_factory=list)

    def add(self, outline: object, *, id: object, label: object = None, probability: object = None) -> None:  # noqa: A002
        """Take a nucleus; an outline that is no list of pairs counts as one without corners."""
        self.outlines.append(_pairs(outline))
        self.ids.append(None if id is None else str(id))
        self.classes.append(None if label is None or label == "" else str(label))
        self.probability.append(float(probability) if isinstance(probability, (int, float)) else np.nan)

    def nuclei(self, **facts: Any) -> GivenNuclei:
        """All of them; ``facts`` are those fields of GivenNuclei that they have in common."""
        sizes = [len(outline) for outline in self.outlines]
        points = np.concatenate(self.outlines) if self.outlines else np.empty((0, 2))
        ids = [str(index) if name is None else name for index, name in enumerate(self.ids)]
        return gathered(points, sizes, ids=ids, classes=self.classes, probability=self.probability, **facts)


def gathered(
    points: np.ndarray,
    sizes: Sequence[int] | np.ndarray,
    *,
    ids: Sequence[str] | pa.Array | None = None,
    classes: Sequence[str | None] | pa.Array | None = None,
    probability: Sequence[float] | np.ndarray | None = None,
    **facts: Any,
) -> GivenNuclei:
    """Nuclei out of their points [V, 2] and how many of them each has [N]; what is None is not known."""
    count = len(sizes)
    return GivenNuclei(
        points=np.ascontiguousarray(points, np.float64),
        starts=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]),
        ids=pa.array(map(str, range(count)) if ids is None else ids, pa.string()),
        classes=pa.nulls(count, pa.string()) if classes is None else pa.array(classes, pa.string()),
        probability=np.full(count, np.nan, np.float32) if probability is None else np.asarray(probability, np.float32),
        **facts,
    )


def from_polygons(polygons: np.ndarray, **columns: Any) -> GivenNuclei:
    """Nuclei out of shapely's geometries [N]: of several polygons the largest; a point is a centroid."""
    largest = np.where(shapely.get_type_id(polygons) == _POINT, polygons, largest_polygons(polygons))
    rings = np.where(shapely.get_type_id(largest) == _POLYGON, shapely.get_exterior_ring(largest), largest)
    points, of = shapely.get_coordinates(rings, return_index=True)
    return gathered(points, np.bincount(of, minlength=len(polygons)), **columns)


def largest_polygons(geometries: np.ndarray) -> np.ndarray:
    """The largest polygon in each of shapely's geometries [N]; None where there is none."""
    parts, owner = shapely.get_parts(geometries, return_index=True)
    parts, within = shapely.get_parts(parts, return_index=True)  # a collection may hold multipolygons
    owner = owner[within]
    is_polygon = shapely.get_type_id(parts) == _POLYGON
    parts, owner = parts[is_polygon], owner[is_polygon]
    order = np.lexsort((-shapely.area(parts), owner))
    of, first = np.unique(owner[order], return_index=True)
    largest = np.full(len(geometries), None, object)
    largest[of] = parts[order][first]
    return largest


def circles(centres: np.ndarray, radius: float) -> np.ndarray:
    """Corners of polygons that have the area of circles around centres [N, 2]: float64 [N * 16, 2]."""
    angle = 2 * np.pi * np.arange(CIRCLE_CORNERS) / CIRCLE_CORNERS
    reach = radius * np.sqrt(angle[1] / np.sin(angle[1]))
    corners = reach * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return (centres[:, None] + corners).reshape(-1, 2)


def _pairs(outline: object) -> np.ndarray:
    try:
        points = np.asarray(outline, np.float64)
    except (TypeError, ValueError):
        return np.empty((0, 2))
    return points[:, :2] if points.ndim == 2 and points.shape[1] >= 2 else np.empty((0, 2))
