"""Polygons of Xenium and SpatialData, and tables of centroids, are read from files as these programs write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from lemon.nuclei.given.nuclei import GivenError
from lemon.nuclei.given.read import read_given
from lemon.slides.reader import SlideReader
from tests.nuclei.given.made_up import CENTRES, CLASSES, COUNT, MPP, OUTLINES, agrees

IDS = [f"aaaa{index:04d}-1" for index in range(COUNT)]
CLOSED = np.concatenate([OUTLINES, OUTLINES[:, :1]], axis=1)  # [N, 13, 2]


def write_xenium(folder: Path, **columns: Any) -> None:
    corners = CLOSED.shape[1]
    table = {
        "cell_id": np.repeat(IDS, corners),
        "vertex_x": (CLOSED[..., 0] * MPP).ravel().astype(np.float32),
        "vertex_y": (CLOSED[..., 1] * MPP).ravel().astype(np.float32),
    }
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table | columns), folder / "nucleus_boundaries.parquet")


def test_nuclei_of_xenium_are_in_um_under_the_ids_of_its_cells(tmp_path: Path, reader: SlideReader) -> None:
    write_xenium(tmp_path / "outs", label_id=np.repeat(np.arange(COUNT, dtype=np.uint32), CLOSED.shape[1]))
    pq.write_table(pa.table({"cell_id": ["x"]}), tmp_path / "outs" / "cells.parquet")
    nuclei = read_given(tmp_path / "outs", reader)
    assert agrees(nuclei, within=0.01)
    assert (nuclei.unit, nuclei.scale, nuclei.centred) == ("um", 4.0, False)
    assert nuclei.ids.to_pylist() == IDS


def test_several_nuclei_of_one_xenium_cell_are_several(tmp_path: Path, reader: SlideReader) -> None:
    corners = CLOSED.shape[1]
    cells = np.repeat([b"cell"] * COUNT, corners)  # early versions write bytes
    write_xenium(tmp_path, cell_id=cells, label_id=np.repeat(np.arange(COUNT), corners))
    nuclei = read_given(tmp_path / "nucleus_boundaries.parquet", reader)
    assert agrees(nuclei, within=0.01)
    assert set(nuclei.ids.to_pylist()) == {"cell"}


def test_geoparquet_has_its_ids_in_the_index(tmp_path: Path, reader: SlideReader) -> None:
    frame = geopandas.GeoDataFrame(
        {"geometry": shapely.polygons(CLOSED), "cell_type": CLASSES}, index=pd.Index(IDS, name="cell_id")
    )
    frame.to_parquet(tmp_path / "shapes.parquet")
    nuclei = read_given(tmp_path / "shapes.parquet", reader)
    assert agrees(nuclei, within=0.01)
    assert (nuclei.ids.to_pylist(), nuclei.classes.to_pylist()) == (IDS, CLASSES)


def test_spatialdata_is_read_in_its_global_coordinates(tmp_path: Path, reader: SlideReader) -> None:
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Scale, Sequence, Translation

    moves = Sequence([Scale([4, 4], axes=("x", "y")), Translation([100, 40], axes=("x", "y"))])
    frame = geopandas.GeoDataFrame({"geometry": shapely.polygons((CLOSED - [100, 40]) / 4)}, index=IDS)
    shapes = ShapesModel.parse(frame, transformations={"global": moves})
    cells = ShapesModel.parse(geopandas.GeoDataFrame({"geometry": shapely.polygons(CLOSED)}, index=IDS))
    SpatialData(shapes={"nucleus_boundaries": shapes, "cell_boundaries": cells}).write(tmp_path / "s.zarr")
    nuclei = read_given(tmp_path / "s.zarr", reader)
    assert agrees(nuclei, within=0.01)
    assert nuclei.ids.to_pylist() == IDS


@pytest.mark.parametrize(
    ("header", "factor", "unit"),
    [
        ("cell_id,x,y,cell_type", 1, "px of level 0"),
        ("id;x_um;y_um;class", MPP, "um"),
        ("Object ID\tCentroid X µm\tCentroid Y µm\tClassification", MPP, "um"),
        ("cell_id,x_centroid,y_centroid,type", MPP, "um"),
        ("cell_id,x_level0_px,y_level0_px,label", 1, "px of level 0"),
    ],
)
def test_a_table_of_centroids_tells_its_unit_by_its_columns(
    tmp_path: Path, reader: SlideReader, header: str, factor: float, unit: str
) -> None:
    separator = next(sign for sign in ",;\t" if sign in header)
    rows = [
        separator.join([IDS[index], f"{x * factor:.4f}", f"{y * factor:.4f}", CLASSES[index]])
        for index, (x, y) in enumerate(CENTRES)
    ]
    (tmp_path / "s.csv").write_text("\n".join([header, *rows]))
    nuclei = read_given(tmp_path / "s.csv", reader)
    assert agrees(nuclei, within=0.01)
    assert (nuclei.unit, nuclei.outlined) == (unit, False)
    assert (nuclei.ids.to_pylist(), nuclei.classes.to_pylist()) == (IDS, CLASSES)


def test_a_parquet_table_of_centroids_is_read_too(tmp_path: Path, reader: SlideReader) -> None:
    table = {"cell_id": np.arange(COUNT), "x_centroid": CENTRES[:, 0] * MPP, "y_centroid": CENTRES[:, 1] * MPP}
    pq.write_table(pa.table(table | {"transcript_counts": np.zeros(COUNT)}), tmp_path / "cells.parquet")
    nuclei = read_given(tmp_path, reader)  # an output of Xenium without boundaries
    assert agrees(nuclei, within=0.01)
    assert nuclei.ids.to_pylist() == [str(index) for index in range(COUNT)]


def test_centroids_of_anndata_are_under_its_names(tmp_path: Path, reader: SlideReader) -> None:
    obs = pd.DataFrame({"cell_type": pd.Categorical([None, *CLASSES[1:]])}, index=IDS)
    anndata.AnnData(np.ones((COUNT, 3)), obs=obs, obsm={"spatial": CENTRES}).write_h5ad(tmp_path / "s.h5ad")
    nuclei = read_given(tmp_path / "s.h5ad", reader)
    assert agrees(nuclei, within=1e-6)
    assert (nuclei.ids.to_pylist(), nuclei.classes.to_pylist()) == (IDS, [None, *CLASSES[1:]])
    anndata.AnnData(np.ones((3, 3))).write_h5ad(tmp_path / "s.h5ad")
    with pytest.raises(GivenError, match=r'has no obsm\["spatial"\]'):
        read_given(tmp_path / "s.h5ad", reader)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("s.csv", b"a,b\n1,2\n", "no columns of centroids"),
        ("s.csv", b"x,y\n1,two\n", "line 2, column y: got 'two'"),
        ("s.csv", b"x,y\n", "no rows behind its header"),
        ("s.parquet", b"PAR1", "cannot be read as Parquet"),
        ("s.h5ad", b"none", "cannot be read as AnnData"),
        ("s.doc", b"none", "has no known suffix; expected one of .geojson"),
    ],
)
def test_a_table_without_nuclei_is_one_line(
    tmp_path: Path, reader: SlideReader, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GivenError, match=reason):
        read_given(tmp_path / name, reader)
    with pytest.raises(GivenError, match="no such file"):
        read_given(tmp_path / "absent.csv", reader)
