"""An embedded slide, as the writers of formats see it: its cells, embeddings and clusters, piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lemon.cells.names import shard_name
from lemon.embed.clusters import Clusters
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import clusters_name, embeddings_name, morphometry_name
from lemon.embed.stream import read_ahead, vectors_of
from lemon.runtime.identifiers import file_stem
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import CELL_MPP, CELLS, CLUSTERS, EMBEDDINGS
from lemon.slides.reader import SlideError, SlideReader


@dataclass(frozen=True)
class EmbeddedSlide:
    """One slide of an output. Rows of all its tables are in the order of its shard of cells."""

    slide_id: str
    path: str
    cells: Store
    store: Store
    spec: EmbeddingSpec
    clusters: Clusters | None

    def rows(self, *columns: str) -> Iterator[pa.Table]:
        """Columns of the cells table, a batch at a time. Raises ShardError."""
        for batch in read_ahead(self.cells, shard_name(self.slide_id), schema=CELLS, columns=list(columns)):
            yield pa.Table.from_batches([batch])

    def table(self, *columns: str) -> pa.Table:
        """``cell_id`` and other columns of the cells table (not images: they may not fit). Raises ShardError."""
        rows = pa.concat_tables(list(self.rows("cell_id", *columns)))
        embedded = self._read_column(embeddings_name(self.slide_id), "cell_id", schema=EMBEDDINGS)
        if not embedded.equals(rows["cell_id"]):
            raise ShardError(f"{self.slide_id}: cells and embeddings differ; the same command again embeds anew")
        return rows

    def vectors(self) -> Iterator[np.ndarray]:
        """Embeddings, a batch at a time: [n, D] of the stored type. Raises ShardError."""
        for batch in read_ahead(self.store, embeddings_name(self.slide_id), schema=EMBEDDINGS, columns=["embedding"]):
            yield vectors_of(batch["embedding"])

    def cluster_codes(self) -> np.ndarray | None:
        """The cluster of each cell, int16 [N]; None where there are none. Raises ShardError."""
        if self.clusters is None:
            return None
        return self._read_column(clusters_name(self.slide_id), "cluster", schema=CLUSTERS).to_numpy()

    def morphometry(self) -> pa.Table | None:
        """What is measured of each cell, in their order; None where it was not asked for. Raises ShardError."""
        name = morphometry_name(self.slide_id)
        return self.store.read_table(name).drop(["cell_id"]) if self.store.exists(name) else None

    def has_all_nuclei(self) -> bool:
        """Whether the cells are all nuclei that were found on the slide, not a sample of them."""
        row = self.cells.read_table(f"slides/{file_stem(self.slide_id)}.parquet").to_pylist()[0]
        return bool(row["n_cells"] == row["n_nuclei"])

    def origin_px(self) -> tuple[int, int]:
        """The corner of the scanned area, which QuPath counts from; (0, 0) where the slide's file is not at hand."""
        try:
            with contextlib.closing(SlideReader(self.path, mpp=CELL_MPP)) as reader:  # the corner has no scale
                return reader.bounds_px[:2]
        except SlideError:
            return 0, 0

    def facts(self, *, mpp: float) -> dict[str, Any]:
        """What a file says of its making."""
        return {
            "model": self.spec.model,
            "model_fingerprint": self.spec.model_fingerprint,
            "context": self.spec.context_name,
            "mpp": mpp,
        }

    def _read_column(self, name: str, column: str, *, schema: pa.Schema) -> pa.ChunkedArray:
        """A small column of a table that this job wrote."""
        batches = read_ahead(self.store, name, schema=schema, columns=[column])
        return pa.chunked_array([batch[column] for batch in batches], schema.field(column).type)
