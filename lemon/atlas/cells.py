"""The cells of an atlas: those of lowest rank over all embedded slides, and those that ``show=`` names besides.

Each has its vector, facts, label and thumbnail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lemon.atlas.config import AtlasConfig
from lemon.atlas.listed import Listed, Place, found_of, read_listed, to_add
from lemon.cells.labels import read_labels
from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import Part, Selection, select_cells
from lemon.cells.shard import images_from_arrow
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import clusters_name, embeddings_name, morphometry_name
from lemon.embed.read import open_embeddings, read_spec
from lemon.embed.stream import vectors_of
from lemon.errors import ConfigError
from lemon.runtime.shards import ShardError
from lemon.runtime.store import BATCH_ROWS, Store, fingerprint
from lemon.schema import CELL_MPP, CELL_PX, MORPHOMETRICS, MORPHOMETRY, SlideRow

THUMBNAIL_PX = 48
"""Side of a thumbnail. It shows the whole crop, since a tumour's nuclei fill it; a multiple of JPEG's 16 px blocks."""

THUMBNAIL_MPP = CELL_MPP * CELL_PX / THUMBNAIL_PX

_PLACE = ("x_level0_px", "y_level0_px", "mpp", "polygon", "rank")
FACTS = ("cell_id", "foreign_id", "foreign_class", "slide_id", "organ", "site", *_PLACE, *MORPHOMETRICS)

MIN_CELLS = 10


@dataclass(frozen=True)
class AtlasCells:
    """Cells in the order of their rank, so that the first n of an atlas are the atlas of n cells.

    ``table`` has FACTS, ``cluster`` (int16, null where there are none), ``row`` (int32, in the slide's tables),
    ``label`` (string, null where not given), and the measures of MORPHOMETRY where ``lemon embed`` computed them.
    """

    table: pa.Table
    vectors: np.ndarray  # [N, D] as stored
    thumbnails: np.ndarray  # [N, 48, 48, 3] uint8
    model: str
    slides: tuple[SlideRow, ...]
    fingerprint: str
    """Names the drawn cells and the model."""
    against: Other | None = None
    listed: Listed | None = None
    n_added: int = 0
    """Cells, the last ones, that are no part of the sample but were named by ``show=``, or labelled with it."""


@dataclass(frozen=True)
class Other:
    """The same cells by another encoder: vectors [N, E], its name, and what names the cells and the model."""

    vectors: np.ndarray
    model: str
    fingerprint: str


@dataclass(frozen=True)
class Embedded:
    """An output of embedding, the key that named it, and what its vectors have in common."""

    key: str
    store: Store
    spec: EmbeddingSpec


@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` (exclusive) of a slide's tables."""

    part: Part
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Chosen:
    """Which cells an atlas is of, before they are read, and the encoders: one, or two that are compared."""

    selection: Selection
    """The cells that are drawn."""
    encoders: tuple[Embedded, ...]
    labels: dict[str, str] | None
    listed: Listed | None = None
    added: tuple[Rows, ...] = ()
    """Named cells that are not drawn, one each."""

    @property
    def rows(self) -> list[Rows]:
        """All that is read: the first rows of slides, and single ones."""
        return [*(Rows(part, 0, part.n_rows) for part in self.selection.parts), *self.added]

    def fingerprint_of(self, encoder: Embedded) -> str:
        """Names the drawn cells and a model."""
        return fingerprint([self.selection.fingerprint, asdict(encoder.spec)])


def choose_cells(config: AtlasConfig) -> Chosen:
    """Find what a config names. Raises ConfigError where a table is absent, does not fit the others or is too small."""
    keys = {"embeddings": config.embeddings} | ({"against": config.against} if config.against else {})
    encoders = [Embedded(key, store := Store(uri), read_spec(store, key=key)) for key, uri in keys.items()]
    if len({encoder.spec.model_fingerprint for encoder in encoders}) < len(encoders):
        raise ConfigError(f"against: got embeddings by {encoders[0].spec.title} twice; expected another encoder's")
    labels = None if config.labels is None else read_labels(config.labels, key="labels")
    listed = None if config.show is None else read_listed(config.show)
    cells = Store(config.cells)
    whole = _embedded_parts(config, cells=cells, encoders=encoders)
    chosen = Chosen(_select(config, cells=cells, whole=whole), tuple(encoders), labels)
    return chosen if listed is None else _with_listed(chosen, listed, whole, config=config)


def read_cells(config: AtlasConfig, chosen: Chosen | None = None, *, scratch: Path | None = None) -> AtlasCells:
    """Read what a config names. Raises ConfigError as ``choose_cells``, and where labels fit none of the cells.

    With ``scratch``, a folder, vectors and thumbnails lie in files there, and memory holds a slide of them at most.
    ``chosen`` are the cells of this config where they are known.
    """
    chosen = chosen or choose_cells(config)
    pieces = chosen.rows
    tables = [_facts(rows, chosen) for rows in tqdm(pieces, unit="slide", desc="cells", disable=None)]
    table = pa.concat_tables(tables, promote_options="default")
    order = np.lexsort((table["cell_id"].to_numpy(zero_copy_only=False), table["rank"].to_numpy()))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    table = table.take(order)
    vectors = [
        _room((len(order), encoder.spec.width), np.dtype(encoder.spec.dtype), scratch, f"vectors-{number}")
        for number, encoder in enumerate(chosen.encoders)
    ]
    thumbnails = _room((len(order), THUMBNAIL_PX, THUMBNAIL_PX, 3), np.dtype(np.uint8), scratch, "thumbnails")
    start = 0
    for rows in tqdm(pieces, unit="slide", desc="images", disable=None):
        places = place[start : start + len(rows)]
        for encoder, room in zip(chosen.encoders, vectors, strict=True):
            embedded = _columns(encoder.store, embeddings_name(rows.part.slide_id), ("embedding",), rows)
            room[places] = vectors_of(embedded["embedding"].combine_chunks())
        _fill_thumbnails(thumbnails, places, rows, chosen.selection)
        start += len(rows)
    slides = {rows.part.slide_id for rows in pieces}
    first, *others = (
        Other(room, encoder.spec.title, chosen.fingerprint_of(encoder))
        for encoder, room in zip(chosen.encoders, vectors, strict=True)
    )
    return AtlasCells(
        table=table.append_column("label", _labels_of(table["cell_id"], chosen.labels, path=config.labels)),
        vectors=first.vectors,
        thumbnails=thumbnails,
        model=first.model,
        slides=tuple(row for row in rows_with_cells(chosen.selection.store) if row.slide_id in slides),
        fingerprint=first.fingerprint,
        against=others[0] if others else None,
        listed=chosen.listed,
        n_added=len(chosen.added),
    )


def _room(shape: tuple[int, ...], dtype: np.dtype[Any], scratch: Path | None, name: str) -> np.ndarray:
    if scratch is None:
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(scratch / f"{name}.npy", "w+", dtype, shape)


def _embedded_parts(config: AtlasConfig, *, cells: Store, encoders: Sequence[Embedded]) -> dict[str, Part]:
    """The whole slides that are wanted and embedded, by id. Raises ConfigError."""
    chosen = select_cells(cells, organs=config.select.organs, slides=config.select.slides)
    embedded = {part.slide_id: part for part in chosen.parts}
    for encoder in encoders:
        files = encoder.store.entries("embeddings")
        embedded = {slide_id: part for slide_id, part in embedded.items() if embeddings_name(slide_id) in files}
        if not embedded:
            raise ConfigError(
                f"{encoder.key}: {encoder.store.uri} holds none of the {len(chosen.parts)} slides; "
                f"expected the output of lemon embed cells={cells.uri}"
            )
    shards = cells.entries("cells")
    absent = [part.name for part in chosen.parts if part.name not in shards]
    if absent:
        raise ConfigError(f"cells: {cells.uri} has no {absent[0]}; expected the output of lemon curate")
    return embedded


def _select(config: AtlasConfig, *, cells: Store, whole: dict[str, Part]) -> Selection:
    """The cells of lowest rank of some slides. Raises ConfigError."""
    try:
        selection = select_cells(cells, slides=list(whole), n_cells=config.n_cells)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"cells: {cells.uri} cannot be read: {' '.join(str(error).split())}") from None
    if selection.n_cells < MIN_CELLS:
        raise ConfigError(f"cells: got {selection.n_cells} in {cells.uri}; expected {MIN_CELLS} at least")
    return selection


def _with_listed(chosen: Chosen, listed: Listed, whole: dict[str, Part], *, config: AtlasConfig) -> Chosen:
    """With the cells of a list, and the labelled ones, that are not drawn. Raises ConfigError where it names none."""
    embeddings = open_embeddings(config.embeddings)
    here = {slide_id: row for slide_id, row in embeddings.rows.items() if slide_id in whole}
    embeddings = replace(embeddings, rows=here)
    labels = chosen.labels or {}
    places = {cell_id: Place(*at) for cell_id, at in embeddings.find([*listed.ids, *labels]).items()}
    listed = found_of(listed, places, path=config.show or "", n_cells=embeddings.n_cells)
    drawn = {part.slide_id: part.n_rows for part in chosen.selection.parts}
    added = to_add(listed, labels, places, drawn)
    return replace(
        chosen,
        listed=listed,
        added=tuple(Rows(whole[place.slide_id], place.row, place.row + 1) for place in added),
    )


def _facts(rows: Rows, chosen: Chosen) -> pa.Table:
    """Facts, cluster, row in the slide and, where they were computed, further measures of some cells of a slide.

    Raises ConfigError where the tables are of other cells.
    """
    selection, embeddings, part = chosen.selection, chosen.encoders[0].store, rows.part
    try:
        facts = pa.Table.from_batches(list(_batches(selection, rows, FACTS))).select(list(FACTS))
    except ShardError as error:
        raise ConfigError(f"cells: {selection.store.uri}: {error}") from None
    ids = facts["cell_id"]
    name = embeddings_name(part.slide_id)
    for encoder in chosen.encoders:
        if not _columns(encoder.store, name, ("cell_id",), rows)["cell_id"].equals(ids):
            raise ConfigError(_of_other_cells(encoder, name, part, selection))
    clusters = np.full(len(rows), -1, np.int16)
    if embeddings.exists(clusters_name(part.slide_id)):
        known = _columns(embeddings, clusters_name(part.slide_id), ("cell_id", "cluster"), rows)
        clusters = known["cluster"].to_numpy()
        if not known["cell_id"].equals(ids):
            raise ConfigError(_of_other_cells(chosen.encoders[0], name, part, selection))
    facts = facts.append_column("cluster", pa.array(clusters, mask=clusters < 0))
    facts = facts.append_column("row", pa.array(np.arange(rows.first, rows.last, dtype=np.int32)))
    if embeddings.exists(morphometry_name(part.slide_id)):
        known = _columns(embeddings, morphometry_name(part.slide_id), MORPHOMETRY.names, rows)
        for column in known.column_names[1:] if known["cell_id"].equals(ids) else ():
            facts = facts.append_column(column, known[column])
    return facts


def _batches(selection: Selection, rows: Rows, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of the cells table. Raises ShardError."""
    size = BATCH_ROWS if len(rows) > 1 else 64  # of a single cell's row group little is held
    return selection.batches(rows.part, columns, first=rows.first, last=rows.last, batch_rows=size)


def _of_other_cells(encoder: Embedded, name: str, part: Part, selection: Selection) -> str:
    return (
        f"{encoder.key}: {encoder.store.uri}/{name} is of other cells than {selection.store.uri}/{part.name}; "
        "the same lemon embed command again mends it"
    )


def _columns(store: Store, name: str, columns: Sequence[str], rows: Rows) -> pa.Table:
    """Some rows of a Parquet file, reading no row group before or behind them."""
    batches: list[pa.RecordBatch] = []
    left = len(rows)
    try:
        for batch in store.iter_batches(name, columns=columns, first=rows.first):
            batches.append(batch.slice(0, left))
            left -= len(batches[-1])
            if not left:
                break
        return pa.Table.from_batches(batches).select(list(columns))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ConfigError(f"{store.uri}/{name}: cannot be read: {' '.join(str(error).split())}") from None


def _fill_thumbnails(thumbnails: np.ndarray, places: np.ndarray, rows: Rows, selection: Selection) -> None:
    """Put those of a slide at their places, a row group at a time: crops take half as much again as thumbnails."""
    done = 0
    for batch in _batches(selection, rows, ["image"]):
        for image in images_from_arrow(batch["image"]):
            size = (THUMBNAIL_PX, THUMBNAIL_PX)
            thumbnails[places[done]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            done += 1


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
