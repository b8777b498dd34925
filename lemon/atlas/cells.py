"""The cells of an atlas: those of lowest rank over all embedded slides, with vectors, facts, labels and thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lemon.atlas.config import AtlasConfig
from lemon.cells.labels import read_labels
from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import Part, Selection, select_cells
from lemon.cells.shard import images_from_arrow
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import SETTINGS, clusters_name, embeddings_name
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store, fingerprint
from lemon.schema import CELL_MPP, CELL_PX, MORPHOMETRICS, SlideRow

THUMBNAIL_PX = 48
"""Side of a thumbnail. It shows the whole crop, since a tumour's nuclei fill it; a multiple of JPEG's 16 px blocks."""

THUMBNAIL_MPP = CELL_MPP * CELL_PX / THUMBNAIL_PX

_PLACE = ("x_level0_px", "y_level0_px", "mpp", "polygon", "rank")
FACTS = ("cell_id", "foreign_id", "foreign_class", "slide_id", "organ", "site", *_PLACE, *MORPHOMETRICS)

MIN_CELLS = 10


@dataclass(frozen=True)
class AtlasCells:
    """Cells in the order of their rank, so that the first n of an atlas are the atlas of n cells.

    ``table`` has FACTS, ``cluster`` (int16, null where there are none) and ``label`` (string, null where not given).
    """

    table: pa.Table
    vectors: np.ndarray  # [N, D] as stored
    thumbnails: np.ndarray  # [N, 48, 48, 3] uint8
    model: str
    slides: tuple[SlideRow, ...]
    fingerprint: str
    """Names the cells and the model."""


def read_cells(config: AtlasConfig) -> AtlasCells:
    """Read what a config names. Raises ConfigError where a table is absent, does not fit the others or is too small."""
    cells, embeddings = Store(config.cells), Store(config.embeddings)
    spec = _embedding_spec(embeddings)
    labels = None if config.labels is None else read_labels(config.labels, key="labels")
    selection = _select(config, cells=cells, embeddings=embeddings)
    parts = [
        _read_part(part, selection=selection, embeddings=embeddings)
        for part in tqdm(selection.parts, unit="slide", desc="cells", disable=None)
    ]
    table = pa.concat_tables([facts for facts, _, _ in parts])
    order = np.lexsort((table["cell_id"].to_numpy(zero_copy_only=False), table["rank"].to_numpy()))
    table = table.take(order)
    chosen = {part.slide_id for part in selection.parts}
    return AtlasCells(
        table=table.append_column("label", _labels_of(table["cell_id"], labels, path=config.labels)),
        vectors=np.concatenate([vectors for _, vectors, _ in parts])[order],
        thumbnails=np.concatenate([thumbnails for _, _, thumbnails in parts])[order],
        model=spec.title,
        slides=tuple(row for row in rows_with_cells(cells) if row.slide_id in chosen),
        fingerprint=fingerprint([selection.fingerprint, asdict(spec)]),
    )


def _embedding_spec(embeddings: Store) -> EmbeddingSpec:
    if not embeddings.exists(SETTINGS):
        raise ConfigError(f"embeddings: {embeddings.uri} has no {SETTINGS}; expected an output of lemon embed")
    spec: EmbeddingSpec = embeddings.read_json(SETTINGS, EmbeddingSpec)
    return spec


def _select(config: AtlasConfig, *, cells: Store, embeddings: Store) -> Selection:
    """The cells of lowest rank of the slides that are wanted and embedded. Raises ConfigError."""
    chosen = select_cells(cells, organs=config.select.organs, slides=config.select.slides)
    files = embeddings.entries("embeddings")
    embedded = [part.slide_id for part in chosen.parts if embeddings_name(part.slide_id) in files]
    if not embedded:
        raise ConfigError(
            f"embeddings: {embeddings.uri} holds none of the {len(chosen.parts)} slides; "
            f"expected the output of lemon embed cells={cells.uri}"
        )
    shards = cells.entries("cells")
    absent = [part.name for part in chosen.parts if part.name not in shards]
    if absent:
        raise ConfigError(f"cells: {cells.uri} has no {absent[0]}; expected the output of lemon curate")
    try:
        selection = select_cells(cells, slides=embedded, n_cells=config.n_cells)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cells: {cells.uri} cannot be read: {' '.join(str(error).split())}") from None
    if selection.n_cells < MIN_CELLS:
        raise ConfigError(f"cells: got {selection.n_cells} in {cells.uri}; expected {MIN_CELLS} at least")
    return selection


def _read_part(part: Part, *, selection: Selection, embeddings: Store) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The first rows of a slide: facts and cluster, embeddings [n, D], thumbnails [n, 48, 48, 3]."""
    facts = _facts(part, selection)
    name = embeddings_name(part.slide_id)
    embedded = _prefix(embeddings, name, ("cell_id", "embedding"), count=part.n_rows)
    clusters = np.full(part.n_rows, -1, np.int16)
    if embeddings.exists(clusters_name(part.slide_id)):
        known = _prefix(embeddings, clusters_name(part.slide_id), ("cell_id", "cluster"), count=part.n_rows)
        clusters = known["cluster"].to_numpy()
        embedded = embedded if known["cell_id"].equals(embedded["cell_id"]) else embedded.slice(0, 0)
    if not embedded["cell_id"].equals(facts["cell_id"]):
        raise ConfigError(
            f"embeddings: {name} is of other cells than {selection.store.uri}/{part.name}; "
            "the same lemon embed command again mends it"
        )
    facts = facts.append_column("cluster", pa.array(clusters, mask=clusters < 0))
    return facts, vectors_of(embedded["embedding"].combine_chunks()), _thumbnails(part, selection)


def _facts(part: Part, selection: Selection) -> pa.Table:
    try:
        return pa.Table.from_batches(list(selection.batches(part, FACTS))).select(list(FACTS))
    except ShardError as error:
        raise ConfigError(f"cells: {selection.store.uri}: {error}") from None


def _prefix(store: Store, name: str, columns: Sequence[str], *, count: int) -> pa.Table:
    """The first ``count`` rows of a Parquet file, reading no row group behind them."""
    batches: list[pa.RecordBatch] = []
    try:
        for batch in store.iter_batches(name, columns=columns):
            batches.append(batch.slice(0, count))
            count -= len(batches[-1])
            if not count:
                break
        return pa.Table.from_batches(batches).select(list(columns))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(f"{store.uri}/{name}: cannot be read: {' '.join(str(error).split())}") from None


def _thumbnails(part: Part, selection: Selection) -> np.ndarray:
    """Made a row group at a time: the crops of 100,000 cells would take 1.1 GB, their thumbnails take 0.7."""
    thumbnails = np.empty((part.n_rows, THUMBNAIL_PX, THUMBNAIL_PX, 3), np.uint8)
    done = 0
    for batch in selection.batches(part, ["image"]):
        for image in images_from_arrow(batch["image"]):
            cv2.resize(image, (THUMBNAIL_PX, THUMBNAIL_PX), dst=thumbnails[done], interpolation=cv2.INTER_AREA)
            done += 1
    return thumbnails


def _labels_of(ids: pa.ChunkedArray, labels: dict[str, str] | None, *, path: str | None) -> pa.Array:
    if labels is None:
        return pa.nulls(len(ids), pa.string())
    cell_labels = [labels.get(cell_id) for cell_id in ids.to_pylist()]
    if not any(cell_labels):
        raise ConfigError(
            f"labels: none of the {len(labels):,} labelled cells of {path} is among the {len(ids):,} of the atlas; "
            "expected ids of this cells table, or a larger n_cells"
        )
    return pa.array(cell_labels, pa.string())
