"""A slide's classes for QuPath and scanpy."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from lemon.cells.names import geojson_name
from lemon.cells.qupath import MEASUREMENTS, GeoJsonWriter
from lemon.classify.labels import UNKNOWN
from lemon.embed.clusters import palette
from lemon.embed.names import h5ad_name
from lemon.embed.slide import EmbeddedSlide
from lemon.errors import ConfigError
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store

UNKNOWN_COLOR = (150, 150, 150)

CONFIDENCE = "Class confidence"
"""Measurement of a nucleus in QuPath, which can be filtered and coloured by."""

FILE_OF = {"h5ad": h5ad_name, "geojson": geojson_name}
"""Name of a slide's file in each format."""


def colors_of(names: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Red, green, blue of each class, and grey for what is unknown."""
    return {**dict(zip(names, palette(len(names)), strict=True)), UNKNOWN: UNKNOWN_COLOR}


def write_format(
    kind: str, store: Store, slide: EmbeddedSlide, classes: pa.Table, colors: Mapping[str, tuple[int, int, int]]
) -> None:
    """Write a slide's file of a format, atomically. Raises ConfigError where cells are others than were embedded."""
    try:
        {"h5ad": _write_h5ad, "geojson": _write_geojson}[kind](store, slide, classes, colors)
    except ShardError as error:
        raise ConfigError(f"cells: {error}") from None


def _write_geojson(
    store: Store, slide: EmbeddedSlide, classes: pa.Table, colors: Mapping[str, tuple[int, int, int]]
) -> None:
    styles = {name: {"name": name, "color": list(color)} for name, color in colors.items()}
    labels, ids, done = classes["label"].to_pylist(), classes["cell_id"], 0
    confidence = classes["confidence"].to_pylist()
    with (
        store.write(geojson_name(slide.slide_id)) as stream,
        GeoJsonWriter(stream, origin_px=slide.origin_px()) as writer,
    ):
        for rows in slide.rows("cell_id", "foreign_id", "polygon", *MEASUREMENTS.values()):
            if not rows["cell_id"].combine_chunks().equals(ids.slice(done, len(rows)).combine_chunks()):
                raise ShardError(f"{slide.slide_id}: cells and embeddings differ; lemon embed again mends it")
            part = slice(done, done + len(rows))
            writer.write(
                rows,
                classifications=[styles[name] for name in labels[part]],
                measurements={CONFIDENCE: confidence[part]},
            )
            done += len(rows)


def _write_h5ad(
    store: Store, slide: EmbeddedSlide, classes: pa.Table, colors: Mapping[str, tuple[int, int, int]]
) -> None:
    from lemon.embed.anndata import annotate  # a second to import

    annotated = annotate(slide)
    names = list(colors)
    for column in ("label", "likely"):
        annotated.obs[column] = pd.Categorical(classes[column].to_pylist(), names)
        annotated.uns[f"{column}_colors"] = np.array(
            ["#{:02x}{:02x}{:02x}".format(*colors[name]) for name in names], object
        )
    for column in ("confidence", "distance", "given"):
        annotated.obs[column] = classes[column].to_numpy()
    with store.write_path(h5ad_name(slide.slide_id)) as path:
        annotated.write_h5ad(path)
