"""Nuclei in tables: polygons of SpatialData and Xenium in Parquet, centroids in CSV, Parquet and AnnData's .h5ad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from lemon.nuclei.given.nuclei import GivenError, GivenNuclei, from_polygons, gathered
from lemon.runtime.tables import ANY_NUMBER, Column, Form, read_user_table
from lemon.slides.reader import SlideReader

XENIUM_FILES = ("nucleus_boundaries.parquet", "cell_boundaries.parquet", "cells.parquet")
"""Of a Xenium output, the first that is there."""

_IDS = ("cell_id", "object_id", "id", "nucleus_id", "label_id", "instance_id")
_CLASSES = ("class", "cell_type", "classification", "type", "label")
_PLACES = (
    ("x", "y", None),
    ("x_px", "y_px", "px"),
    ("x_level0_px", "y_level0_px", "px"),
    ("x_um", "y_um", "um"),
    ("x_centroid", "y_centroid", "um"),  # Xenium's cells.parquet and cells.csv.gz
    ("Centroid X um", "Centroid Y um", "um"),  # QuPath's measurements, where the sign of micro is not ASCII
    ("Centroid X µm", "Centroid Y µm", "um"),
    ("Centroid X px", "Centroid Y px", "px"),
    ("centroid_x", "centroid_y", None),
)
"""Columns of centroids, and their unit where the name tells it; the first pair that a table has is taken."""

_TABLE = Form(
    "",
    tuple(Column(name, required=False) for name in (*_IDS, *_CLASSES, "probability"))
    + tuple(Column(name, required=False, number=ANY_NUMBER) for place in _PLACES for name in place[:2]),
    others=True,
    error=GivenError,
)


def read_table(path: Path, reader: SlideReader) -> GivenNuclei:
    """The nuclei of a CSV or Parquet table. Raises GivenError."""
    if path.suffix not in (".parquet", ".pq"):
        return _centroids(path, reader)
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise GivenError(f"cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    if {"vertex_x", "vertex_y", "cell_id"} <= {*schema.names}:
        return _vertices(path, reader)
    if b"geo" in (schema.metadata or {}):
        return _geoparquet(path, schema)
    return _centroids(path, reader)


def _centroids(path: Path, reader: SlideReader) -> GivenNuclei:
    table = read_user_table(path, form=_TABLE)
    place = next((each for each in _PLACES if each[0] in table.columns and each[1] in table.columns), None)
    if place is None:
        known = "; ".join(f"{x}, {y}" for x, y, _ in _PLACES)
        raise GivenError(f"no columns of centroids; expected one of the pairs {known}")
    points = np.array([table.columns[name] for name in place[:2]], np.float64).T  # an empty value is NaN
    column = {kind: next((name for name in names if name in table.columns), None) for kind, names in _NAMED.items()}
    values = {kind: None if name is None else table.columns[name] for kind, name in column.items()}
    ids = values["ids"] and [str(index) if name is None else name for index, name in enumerate(values["ids"])]
    probability = values["probability"]
    numbers = None if probability is None else [_number(each) for each in probability]
    scale, unit = (1 / reader.mpp, "um") if place[2] == "um" else (1.0, "px of level 0")
    sizes = np.ones(len(points), np.int64)
    return gathered(
        points,
        sizes,
        ids=ids,
        classes=values["classes"],
        probability=numbers,
        unit=unit,
        scale=scale,
        notes=table.notes,
    )


_NAMED = {"ids": _IDS, "classes": _CLASSES, "probability": ("probability",)}


def _number(text: str | None) -> float:
    try:
        return float("nan") if text is None else float(text)
    except ValueError:
        return float("nan")


def _vertices(path: Path, reader: SlideReader) -> GivenNuclei:
    """Xenium's boundaries: a row a corner, in um; since its version 2 a cell may have several nuclei (label_id)."""
    table = pq.read_table(path)
    names = [name for name in ("cell_id", "label_id") if name in table.column_names]
    keys = [as_text(table[name]).dictionary_encode().indices.to_numpy() for name in names]
    begins = np.ones(len(table), bool)
    begins[1:] = np.any([np.diff(key) != 0 for key in keys], axis=0)
    starts = np.flatnonzero(begins)
    points = np.stack([table["vertex_x"].to_numpy(), table["vertex_y"].to_numpy()], axis=1).astype(np.float64)
    ids = as_text(table["cell_id"]).take(starts)
    sizes = np.diff(np.append(starts, len(table)))
    return gathered(points, sizes, ids=ids, unit="um", scale=1 / reader.mpp)


def _geoparquet(path: Path, schema: pa.Schema) -> GivenNuclei:
    """GeoParquet, as SpatialData keeps its shapes: WKB, ids in the index, circles as points with a radius."""
    geometry = json.loads(schema.metadata[b"geo"]).get("primary_column", "geometry")
    index = json.loads(schema.metadata.get(b"pandas", b"{}")).get("index_columns", [])
    named = [name for name in (*index, *_IDS) if isinstance(name, str) and name in schema.names]
    classes = next((name for name in _CLASSES if name in schema.names), None)
    wanted = [geometry, *named[:1], *([classes] if classes else [])]
    table = pq.read_table(path, columns=wanted)
    try:
        shapes = shapely.from_wkb(table[geometry].to_numpy(zero_copy_only=False))
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise GivenError(f"its geometry cannot be read as WKB: {error}") from None
    return from_polygons(
        shapes,
        ids=as_text(table[named[0]]) if named else None,
        classes=as_text(table[classes]) if classes else None,
    )


def read_spatialdata(path: Path, _: SlideReader) -> GivenNuclei:
    """The polygons of a SpatialData store (``.zarr`` with ``shapes/``), in its coordinate system ``global``.

    Of several elements that with ``nucle`` in its name, else the only one with polygons. Raises GivenError.
    """
    try:
        import spatialdata
        from spatialdata.transformations import get_transformation
    except ImportError:
        raise GivenError("spatialdata is not installed; expected pip install 'lemon-nuclei[spatialdata]'") from None
    try:
        shapes = spatialdata.read_zarr(path, selection=("shapes",)).shapes
    except Exception as error:  # noqa: BLE001 - zarr's and spatialdata's readers raise what they like
        raise GivenError(f"cannot be read as SpatialData: {' '.join(str(error).split())[:200]}") from None
    polygons = [name for name, frame in shapes.items() if (frame.geom_type != "Point").any()]
    names = [name for name in polygons if "nucle" in name.lower()] or polygons or list(shapes)
    if len(names) != 1:
        raise GivenError(
            f"has the shapes {', '.join(shapes) or 'none'}; expected one of nuclei: export it as GeoParquet"
        )
    frame = shapes[names[0]]
    matrix = get_transformation(frame).to_affine_matrix(("x", "y"), ("x", "y"))
    geometry = shapely.transform(frame.geometry.to_numpy(), lambda points: points @ matrix[:2, :2].T + matrix[:2, 2])
    classes = next((frame[name].astype(str).tolist() for name in _CLASSES if name in frame), None)
    return from_polygons(geometry, ids=[str(name) for name in frame.index], classes=classes)


def read_anndata(path: Path, _: SlideReader) -> GivenNuclei:
    """The centroids in ``obsm["spatial"]`` of an .h5ad, read without its matrix; ids are ``obs_names``.

    Raises GivenError.
    """
    import anndata
    import h5py

    try:
        with h5py.File(path) as file:
            obs = anndata.io.read_elem(file["obs"])
            spatial = np.asarray(file["obsm"]["spatial"], np.float64) if "spatial" in file.get("obsm", {}) else None
    except (OSError, KeyError, ValueError) as error:
        raise GivenError(f"cannot be read as AnnData: {' '.join(str(error).split())[:200]}") from None
    if spatial is None or spatial.ndim != 2 or spatial.shape[1] < 2:
        raise GivenError('has no obsm["spatial"] of [N, 2]; expected centroids there, as scanpy and squidpy have them')
    name = next((name for name in _CLASSES if name in obs), None)
    classes = None if name is None else [None if each != each else str(each) for each in obs[name].tolist()]
    return gathered(
        spatial[:, :2], np.ones(len(spatial), np.int64), ids=[str(each) for each in obs.index], classes=classes
    )


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of bytes, integers, text, or a dictionary of those, as text."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return pc.cast(array.dictionary_decode() if pa.types.is_dictionary(array.type) else array, pa.string())
