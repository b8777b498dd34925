"""The formats of embedded slides: clusters first, then each file that is wanted and not there yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
from shapely.errors import ShapelyError

from lemon.cells.names import geojson_name
from lemon.cells.qupath import MEASUREMENTS, GeoJsonWriter
from lemon.embed.clusters import Clusters, assign_clusters
from lemon.embed.ledger import EmbedLedger
from lemon.embed.names import clusters_name, h5ad_name, morphometry_name, spatialdata_name
from lemon.embed.slide import EmbeddedSlide
from lemon.runtime.pool import Worker
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import MORPHOMETRY, EmbeddedRow

Format: TypeAlias = tuple[str, Callable[[str], str], Callable[[EmbeddedSlide], None]]


def write_clusters(slide: EmbeddedSlide) -> None:
    """Write ``clusters/<slide>.parquet``: the cluster of each cell, in their order. Raises ShardError."""
    if slide.clusters is not None:
        assign_clusters(slide.clusters, slide.store, slide.slide_id)


def write_geojson(slide: EmbeddedSlide) -> None:
    """Write ``geojson/<slide>.geojson.gz``, atomically: every nucleus in the class of its cluster.

    Raises ShardError when a table cannot be read, OSError when the file cannot be written.
    """
    codes = slide.cluster_codes()
    classes = [
        {"name": f"Cluster {index}", "color": list(color)}
        for index, color in enumerate(slide.clusters.colors if slide.clusters else [])
    ]
    done = 0
    with (
        slide.store.write(geojson_name(slide.slide_id)) as stream,
        GeoJsonWriter(stream, origin_px=slide.origin_px()) as writer,
    ):
        for rows in slide.rows("cell_id", "polygon", "foreign_id", *MEASUREMENTS.values()):
            cluster_names = None if codes is None else [classes[code] for code in codes[done : done + len(rows)]]
            writer.write(rows, classifications=cluster_names)
            done += len(rows)


def write_morphometry(slide: EmbeddedSlide) -> None:
    """Write ``morphometry/<slide>.parquet``; files that are to hold what it says are made again. Raises ShardError."""
    from lemon.cells.morphometry import COLUMNS, measure_cells, neighbourhood  # scipy's trees

    parts = [pa.table(measure_cells(rows)) for rows in slide.rows(*COLUMNS)]
    columns = dict(zip(parts[0].column_names, pa.concat_tables(parts).columns, strict=True)) if parts else {}
    rows = slide.table("x_level0_px", "y_level0_px", "mpp")
    place = np.stack([rows["x_level0_px"].to_numpy(), rows["y_level0_px"].to_numpy()], axis=1)
    around = neighbourhood(place * rows["mpp"].to_numpy()[:, None])
    if not slide.has_all_nuclei():
        around = {name: np.full_like(values, np.nan) for name, values in around.items()}
    table = pa.table({"cell_id": rows["cell_id"]} | columns | around).select(MORPHOMETRY.names).cast(MORPHOMETRY)
    slide.store.write_table(morphometry_name(slide.slide_id), table, compression="zstd")
    for stale in (h5ad_name, spatialdata_name):
        slide.store.delete(stale(slide.slide_id))


def _write_h5ad(slide: EmbeddedSlide) -> None:
    from lemon.embed.anndata import write_h5ad  # a second to import

    write_h5ad(slide)


def _write_spatialdata(slide: EmbeddedSlide) -> None:
    from lemon.embed.spatialdata import write_spatialdata  # optional

    write_spatialdata(slide)


FORMATS: Mapping[str, tuple[Callable[[str], str], Callable[[EmbeddedSlide], None]]] = {
    "morphometry": (morphometry_name, write_morphometry),
    "h5ad": (h5ad_name, _write_h5ad),
    "geojson": (geojson_name, write_geojson),
    "spatialdata": (spatialdata_name, _write_spatialdata),
}
"""Name of a slide's file, and its writer."""


class Export(NamedTuple):
    """An embedded slide, and where its file was when it was curated."""

    row: EmbeddedRow
    path: str

    @property
    def slide_id(self) -> str:
        """By which its attempts are counted."""
        return self.row.slide_id


class Exporter(Worker[Export, EmbeddedRow]):
    """Writes the formats of one slide at a time."""

    stage = "formats"
    ledger: EmbedLedger
    fatal = (OSError, pa.ArrowException)

    def __init__(self, *, ledger: EmbedLedger, cells: Store, clusters: Clusters | None, formats: Iterable[str]) -> None:
        self.ledger, self.cells, self.clusters = ledger, cells, clusters
        self.formats = [name for name in formats if name in FORMATS]

    def without_file(self, slide_ids: Iterable[str]) -> set[str]:
        """The slides of which a file is still to be written."""
        slide_ids = list(slide_ids)
        return set().union(*(self.ledger.without_file(slide_ids, name) for _, name, _ in self._wanted()))

    def work(self, item: Export) -> EmbeddedRow:
        """Write what a slide lacks; returns its row of the ledger, ``partial`` where a format could not be made."""
        start = time.perf_counter()
        slide_id = item.row.slide_id
        slide = EmbeddedSlide(slide_id, item.path, self.cells, self.ledger.store, self.ledger.spec, self.clusters)
        faults = []
        for kind, name, write in self._wanted():
            if not self.ledger.store.exists(name(slide_id)):
                try:
                    write(slide)
                except (ShardError, ShapelyError, ValueError) as error:
                    faults.append(f"{kind}: {error}")
        total_s = round((item.row.total_s or 0.0) + time.perf_counter() - start, 3)
        return self._commit(replace(item.row, total_s=total_s), "; ".join(faults))

    def fail(self, item: Export, reason: str) -> EmbeddedRow:
        """Give a slide's formats up; its embeddings stay."""
        return self._commit(item.row, reason)

    def _commit(self, row: EmbeddedRow, error: str) -> EmbeddedRow:
        status = "partial" if error else "done"
        return self.ledger.commit(replace(row, status=status, error=" ".join(error.split()) or None))

    def _wanted(self) -> list[Format]:
        always: list[Format] = [("clusters", clusters_name, write_clusters)] if self.clusters is not None else []
        return always + [(kind, *FORMATS[kind]) for kind in self.formats]
