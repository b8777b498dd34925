"""The cells that are described: those of lowest rank over all embedded slides, with vectors, measures and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lemon.cells.labels import read_labels
from lemon.cells.ledger import rows_with_cells
from lemon.cells.morphometry import COLUMNS, MEASURES, NEIGHBOURHOOD, STORED, measure_cells, neighbourhood
from lemon.cells.select import Part, Selection, select_cells
from lemon.cells.shard import images_from_arrow
from lemon.describe.config import DescribeConfig
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import SETTINGS, clusters_name, embeddings_name
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import Store
from lemon.schema import CELLS, CLUSTERS, EMBEDDINGS, SlideRow


@dataclass(frozen=True)
class DescribedCells:
    """N cells, slide after slide.

    Attributes:
        selection: where they are.
        groups: str [N], the group of each; None where a cell has none.
        slides: str [N].
        measures: column of a measure -> float32 [N].
        vectors: [N, D] as stored.
        model: that the vectors are by.
        notes: lines on what is not known.
    """

    selection: Selection
    groups: np.ndarray
    slides: np.ndarray
    measures: dict[str, np.ndarray]
    vectors: np.ndarray
    model: str
    notes: tuple[str, ...] = ()

    def images(self, indices: Sequence[int]) -> np.ndarray:
        """Crops of some of the cells, in their order: uint8 [K, 60, 60, 3]."""
        wanted = np.unique(np.asarray(indices, np.int64))
        found: dict[int, np.ndarray] = {}
        for part, start in zip(self.selection.parts, self.selection.starts.tolist(), strict=True):
            here = wanted[(wanted >= start) & (wanted < start + part.n_rows)] - start
            done = 0
            for batch in self.selection.batches(part, ["image"]) if len(here) else ():
                rows = here[(here >= done) & (here < done + len(batch))] - done
                for row, image in zip(
                    rows.tolist(), images_from_arrow(batch["image"].take(pa.array(rows))), strict=True
                ):
                    found[start + done + row] = image
                done += len(batch)
        return np.stack([found[int(index)] for index in indices])


def read_cells(config: DescribeConfig) -> DescribedCells:
    """Read what a config names. Raises ConfigError where a table is absent or does not fit the others."""
    cells, embeddings = Store(config.cells), Store(config.embeddings)
    if not embeddings.exists(SETTINGS):
        raise ConfigError(f"embeddings: {embeddings.uri} has no {SETTINGS}; expected an output of lemon embed")
    spec: EmbeddingSpec = embeddings.read_json(SETTINGS, EmbeddingSpec)
    rows = {row.slide_id: row for row in rows_with_cells(cells)}
    there = embeddings.entries("embeddings")
    embedded = [slide_id for slide_id in rows if embeddings_name(slide_id) in there]
    if not embedded:
        raise ConfigError(f"embeddings: {embeddings.uri} holds none of the {len(rows)} slides of cells={cells.uri}")
    selection = select_cells(cells, slides=embedded, n_cells=config.n_cells)
    labels = None if config.labels is None else read_labels(config.labels, key="labels")
    try:
        parts = [
            _read_part(
                part, rows[part.slide_id], selection=selection, embeddings=embeddings, by=config.by, labels=labels
            )
            for part in tqdm(selection.parts, unit="slide", desc="measure", disable=None)
        ]
    except (ShardError, OSError, pa.ArrowException) as error:
        raise ConfigError(f"cells: {' '.join(str(error).split())}; the same lemon embed command mends it") from None
    groups = np.concatenate([part["groups"] for part in parts])
    if len({*groups} - {None}) < 2:
        remedy = {"cluster": "lemon embed with clusters.k", "foreign_class": "lemon curate with cells_from="}
        expected = "two labels among these cells" if labels else remedy[config.by]
        raise ConfigError(f"by: got {len({*groups} - {None})} groups of {len(groups):,} cells; expected {expected}")
    sampled = [row.slide_id for row in rows.values() if row.n_cells != row.n_nuclei]
    note = f"distances and density are of the {len(embedded) - len(sampled)} slides of which all nuclei were kept"
    return DescribedCells(
        selection=selection,
        groups=groups,
        slides=np.concatenate([np.full(part.n_rows, part.slide_id, object) for part in selection.parts]),
        measures={
            measure.column: np.concatenate([part["measures"][measure.column] for part in parts]) for measure in MEASURES
        },
        vectors=np.concatenate([part["vectors"] for part in parts]),
        model=spec.title,
        notes=(note,) if sampled else (),
    )


def _read_part(
    part: Part,
    row: SlideRow,
    *,
    selection: Selection,
    embeddings: Store,
    by: str,
    labels: dict[str, str] | None,
) -> dict[str, Any]:
    """Groups, measures and vectors of one slide's cells. Raises ShardError where tables are of different cells."""
    columns: list[dict[str, np.ndarray]] = []
    facts = []
    for batch in selection.batches(part, [*COLUMNS, "foreign_class"]):
        rows = pa.Table.from_batches([batch])
        known = {name: rows[name].to_numpy() for name in rows.column_names if name in STORED}
        columns.append(known | measure_cells(rows))
        facts.append(rows.select(["cell_id", "foreign_class"]))
    table = pa.concat_tables(facts)
    measures = {name: np.concatenate([each[name] for each in columns]) for name in columns[0]}
    measures |= _neighbourhood(part, row, selection=selection)
    embedded = _prefix(embeddings, embeddings_name(part.slide_id), EMBEDDINGS, "embedding", part.n_rows)
    ids = table["cell_id"]
    if not embedded["cell_id"].equals(ids):
        raise ShardError(f"{part.slide_id}: cells and embeddings are of different cells")
    if labels is not None:
        groups = [labels.get(cell_id) for cell_id in ids.to_pylist()]
    elif by == "foreign_class":
        groups = table["foreign_class"].to_pylist()
    elif embeddings.exists(clusters_name(part.slide_id)):
        codes = _prefix(embeddings, clusters_name(part.slide_id), CLUSTERS, "cluster", part.n_rows)["cluster"]
        groups = [f"Cluster {code}" for code in codes.to_pylist()]
    else:
        groups = [None] * len(ids)
    vectors = vectors_of(embedded["embedding"].combine_chunks())
    return {"groups": np.array(groups, object), "measures": measures, "vectors": vectors}


def _neighbourhood(part: Part, row: SlideRow, *, selection: Selection) -> dict[str, np.ndarray]:
    """Measured among all nuclei of the slide, of which the part has the first; NaN where only a sample was kept."""
    if row.n_cells != row.n_nuclei:
        return {measure.column: np.full(part.n_rows, np.nan, np.float32) for measure in NEIGHBOURHOOD}
    batches = read_shard(selection.store, part.name, schema=CELLS, columns=["x_level0_px", "y_level0_px", "mpp"])
    table = pa.Table.from_batches(list(batches))
    place = np.stack([table["x_level0_px"].to_numpy(), table["y_level0_px"].to_numpy()], axis=1)
    around = neighbourhood(place * table["mpp"].to_numpy()[:, None])
    return {name: values[: part.n_rows] for name, values in around.items()}


def _prefix(store: Store, name: str, schema: pa.Schema, column: str, count: int) -> pa.Table:
    """``cell_id`` and a column of the first ``count`` rows of a table of embeddings."""
    batches: list[pa.RecordBatch] = []
    for batch in read_shard(store, name, schema=schema, columns=["cell_id", column]):
        batches.append(batch.slice(0, count))
        count -= len(batches[-1])
        if not count:
            break
    return pa.Table.from_batches(batches)
