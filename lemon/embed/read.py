"""An output of embedding as other stages read it: its slides, their vectors and the places of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lemon.curate.config import CELLS_FOLDER
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import SETTINGS, embeddings_name
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.runtime.ledger import Ledger
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import BATCH_ROWS, Store
from lemon.schema import EMBEDDINGS, EmbeddedRow


@dataclass(frozen=True)
class Embeddings:
    """The embedded slides of an output, by id in the order of ids."""

    store: Store
    spec: EmbeddingSpec
    rows: dict[str, EmbeddedRow]

    @property
    def n_cells(self) -> int:
        """Of all slides."""
        return sum(row.n_cells for row in self.rows.values())

    def batches(
        self, slide_id: str, columns: Sequence[str], *, first: int = 0, batch_rows: int = BATCH_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """Columns of a slide's embeddings from row ``first`` on, a batch at a time.

        Raises ConfigError where they cannot be read or are not those that the ledger names.
        """
        digest = self.rows[slide_id].embeddings_digest
        try:
            yield from read_shard(
                self.store,
                embeddings_name(slide_id),
                schema=EMBEDDINGS,
                columns=columns,
                digest=digest,
                first=first,
                batch_rows=batch_rows,
            )
        except ShardError as error:
            line = f"embeddings: {self.store.uri}/{error}; the same lemon embed command again mends it"
            raise ConfigError(line) from None

    def vectors(self, slide_id: str) -> Iterator[np.ndarray]:
        """A slide's vectors, float32 [n, D], a batch at a time. Raises ConfigError."""
        for batch in self.batches(slide_id, ["embedding"]):
            yield vectors_of(batch["embedding"]).astype(np.float32)

    def row(self, slide_id: str, number: int) -> pa.RecordBatch:
        """``cell_id``, place and embedding of one cell, by its row. Raises ConfigError."""
        columns = ["cell_id", "x_level0_px", "y_level0_px", "embedding"]
        return next(self.batches(slide_id, columns, first=number, batch_rows=64)).slice(0, 1)

    def facts(self, slide_id: str, number: int) -> pa.RecordBatch:
        """``cell_id`` and place of one cell, by its row, without its embedding, which takes longest to read."""
        return next(
            self.batches(slide_id, ["cell_id", "x_level0_px", "y_level0_px"], first=number, batch_rows=64)
        ).slice(0, 1)

    def take(self, places: Sequence[tuple[str, int]]) -> np.ndarray:
        """Vectors of cells by slide and row, float32 [N, D]; a slide is read up to its last one. Raises ConfigError."""
        vectors = np.empty((len(places), self.spec.width), np.float32)
        for slide_id in {slide for slide, _ in places}:
            rows = np.array([row if slide == slide_id else -1 for slide, row in places], np.int64)
            start = 0
            for part in self.vectors(slide_id):
                here = np.flatnonzero((rows >= start) & (rows < start + len(part)))
                vectors[here] = part[rows[here] - start]
                start += len(part)
                if start > rows.max():
                    break
        return vectors

    def find(self, cell_ids: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Slide and row of each cell id that there is. Slides whose id begins a cell's id are looked at first.

        Raises ConfigError.
        """
        left, found = set(cell_ids), {}
        likely = {slide for slide in self.rows if any(cell_id.startswith(slide) for cell_id in left)}
        for slide_id in sorted(self.rows, key=lambda slide: (slide not in likely, slide)):
            start = 0
            for batch in self.batches(slide_id, ["cell_id"]) if left else ():
                ids = batch["cell_id"].to_pylist()
                if not left.isdisjoint(ids):
                    found.update({each: (slide_id, start + row) for row, each in enumerate(ids) if each in left})
                    left.difference_update(ids)
                start += len(ids)
        return found


def read_spec(store: Store, *, key: str = "embeddings") -> EmbeddingSpec:
    """What the embeddings of an output have in common. Raises ConfigError, by ``key``, where there are none."""
    if not store.exists(SETTINGS):
        raise ConfigError(f"{key}: {store.uri} has no {SETTINGS}; expected an output of lemon embed")
    spec: EmbeddingSpec = store.read_json(SETTINGS, EmbeddingSpec)
    return spec


def open_embeddings(uri: str) -> Embeddings:
    """The embedded slides of an output. Raises ConfigError where there are none."""
    store = Store(uri)
    spec = read_spec(store)
    rows = {
        slide_id: row
        for slide_id, row in Ledger(store, EmbeddedRow, counts_attempts=False).rows().items()
        if row.status != "failed" and row.n_cells
    }
    if not rows:
        raise ConfigError(f"embeddings: {store.uri} holds no embedded cells; expected an output of lemon embed")
    return Embeddings(store, spec, rows)


def cells_of(embeddings: Embeddings, cells: str | None) -> Store | None:
    """The cells table of embeddings: as it is given, else what ``lemon embed slides=`` left beside; None without."""
    if cells is not None:
        return Store(cells)
    beside = Store(f"{embeddings.store.uri}/{CELLS_FOLDER}")
    return beside if beside.entries("slides") else None
