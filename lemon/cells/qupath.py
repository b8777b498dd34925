"""Nuclei as QuPath opens them: a stream of GeoJSON detections in level-0 px."""

from __future__ import annotations

import gzip
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
import shapely

_NAMESPACE = uuid.UUID("6f0e4e0e-0c1f-5a3b-9b7d-1e3b5c0a4d2f")  # so that a cell has the same id in every run
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
NUCLEUS = {"name": "Nucleus", "color": [120, 60, 160]}
MEASUREMENTS = {
    "Area um2": "area_um2",
    "Eccentricity": "eccentricity",
    "Solidity": "solidity",
    "Hematoxylin OD mean": "hematoxylin_od_mean",
}


class GeoJsonWriter:
    """Writes a gzipped FeatureCollection to a binary stream, region by region.

    ``origin_px`` is the corner of the scanned area: QuPath crops a slide to it and counts from there.
    """

    def __init__(self, stream: IO[bytes], *, origin_px: tuple[int, int] = (0, 0)) -> None:
        # No file name and no time in the header: the same nuclei give the same bytes.
        self._gzip = gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=4, mtime=0)
        self._origin_px = np.array(origin_px, float)
        self._first = True

    def __enter__(self) -> GeoJsonWriter:
        self._gzip.write(b'{"type":"FeatureCollection","features":[\n')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._gzip.write(b"\n]}\n")
        self._gzip.close()

    def write(
        self,
        rows: pa.Table,
        *,
        classifications: Sequence[Mapping[str, object]] | None = None,
        measurements: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Append rows of the cells table (images not needed), each in its class ``{name, color}``.

        ``measurements`` are shown beside those of the cells table, a value a row.

        Without classifications a nucleus has the class of the program that found it, or that of all nuclei. An id of
        QuPath's stays a nucleus' id, so that QuPath knows the object again.
        """
        classes: Sequence[Mapping[str, object]]
        if classifications is None:
            classes = [{"name": name} if name else NUCLEUS for name in _optional(rows, "foreign_class")]
        else:
            classes = classifications
        polygons = shapely.from_wkb(rows["polygon"].to_numpy(zero_copy_only=False))
        measured: dict[str, Sequence[float]] = {name: rows[column].to_pylist() for name, column in MEASUREMENTS.items()}
        measured |= measurements or {}
        foreign_ids, cell_ids = _optional(rows, "foreign_id"), rows["cell_id"].to_pylist()
        for index, (cell_id, polygon) in enumerate(zip(cell_ids, polygons, strict=True)):
            ring = np.round(shapely.get_coordinates(polygon) - self._origin_px, 2)
            feature = {
                "type": "Feature",
                "id": _uuid_of(cell_id, foreign_ids[index]),
                "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]},
                "properties": {
                    "objectType": "detection",
                    "name": cell_id,
                    "classification": classes[index],
                    "measurements": {name: round(values[index], 4) for name, values in measured.items()},
                },
            }
            self._gzip.write((b"" if self._first else b",\n") + json.dumps(feature, separators=(",", ":")).encode())
            self._first = False


def _optional(rows: pa.Table, column: str) -> list[str | None]:
    return rows[column].to_pylist() if column in rows.column_names else [None] * len(rows)


def _uuid_of(cell_id: str, foreign_id: str | None) -> str:
    """QuPath's own id of an object that came from there, else one made of the cell's."""
    if foreign_id is not None and _UUID.fullmatch(foreign_id):
        return foreign_id
    return str(uuid.uuid5(_NAMESPACE, cell_id))
