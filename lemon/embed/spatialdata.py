"""A slide as SpatialData, for LazySlide, squidpy and napari-spatialdata: one .zarr folder a slide."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pandas as pd
import shapely

from lemon.embed.anndata import EMBEDDING, annotate
from lemon.embed.names import spatialdata_name
from lemon.embed.slide import EmbeddedSlide
from lemon.errors import ConfigError
from lemon.runtime.store import Store

SHAPES, TABLE = "cells", "cells_features"


def check_spatialdata(store: Store) -> None:
    """Raise ConfigError unless SpatialData can be written to a store."""
    if importlib.util.find_spec("spatialdata") is None:
        raise ConfigError(
            "format: got spatialdata, which is not installed; expected pip install 'lemon-nuclei[spatialdata]' first"
        )
    if not store.is_local:
        raise ConfigError(f"format: got spatialdata with output={store.uri}; expected a local output, it is a folder")


def write_spatialdata(slide: EmbeddedSlide) -> None:
    """Write ``spatialdata/<slide>.zarr``, atomically: polygons, and a table that annotates them, joined on cell_id.

    Coordinates are level-0 px (the system ``global``). Unlike the other writers this one holds the slide's polygons and
    embeddings in memory. Raises ShardError when a table cannot be read, OSError when nothing can be written.
    """
    import geopandas
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel

    table = annotate(slide)
    table.obsm[EMBEDDING] = np.concatenate([part.astype(np.float32) for part in slide.vectors()])
    polygons = shapely.from_wkb(slide.table("polygon")["polygon"].to_numpy())
    shapes = geopandas.GeoDataFrame({"geometry": polygons}, index=table.obs_names.copy())
    table.obs["region"] = pd.Categorical.from_codes(np.zeros(table.n_obs, int), [SHAPES])
    table.obs["cell_id"] = table.obs_names.to_numpy()
    table.obs.index.name = None  # the column has the name now
    data = SpatialData(
        shapes={SHAPES: ShapesModel.parse(shapes)},
        tables={TABLE: TableModel.parse(table, region=SHAPES, region_key="region", instance_key="cell_id")},
    )
    with slide.store.write_path(spatialdata_name(slide.slide_id)) as path, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")  # nothing that a user could do about it
        data.write(path)
