"""The nuclei most like a nucleus, over all slides of an output of embedding: as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv

from lemon.cells.sheet import crop_of_cell
from lemon.embed.read import Embeddings, cells_of, open_embeddings
from lemon.errors import EXIT_OK, ConfigError
from lemon.find.config import FindConfig
from lemon.find.index import Hit, NeighbourIndex, open_index
from lemon.find.query import Queries, queries_of_cells, queries_of_images
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.store import Store
from lemon.schema import CELL_MPP, NEIGHBOURS

logger = stage_logger(__name__, "find")

TABLE, SHEET, PICTURE = "neighbours.parquet", "neighbours.csv", "neighbours.png"

OUTPUT_NAMES = (TABLE, SHEET, PICTURE)
"""What a search writes in its output."""

_FACTS = pa.schema([NEIGHBOURS.field(name) for name in ("cell_id", "x_level0_px", "y_level0_px")])


def main(config: FindConfig) -> int:
    """Find the neighbours, write them and log where they are; returns the exit code. Raises ConfigError."""
    embeddings = open_embeddings(config.embeddings)
    queries = _queries(embeddings, config)
    index = open_index(embeddings, config.index)
    found = list(neighbours_of(embeddings, index, queries, k=config.k, probes=config.probes))
    table = pa.concat_tables([rows for rows, _ in found])
    cells = cells_of(embeddings, config.cells)
    with hold(config.output, stage="find", names=OUTPUT_NAMES) as store:
        store.write_table(TABLE, table, compression="zstd")
        with store.write(SHEET) as stream:
            pyarrow.csv.write_csv(table, stream)
        if cells is not None:
            _draw(store, cells, queries, found)
    pictured = "" if cells is None else f", {PICTURE}"
    logger.info(
        f"{len(table):,} neighbours of {len(queries.names)} among {embeddings.n_cells:,} cells of "
        f"{len(embeddings.rows)} slides: {TABLE}, {SHEET}{pictured} in {store.uri}"
    )
    if cells is None:
        logger.info("no picture: cells=the output of lemon curate that was embedded draws one")
    return EXIT_OK


def find_neighbours(
    embeddings: str,
    *,
    cell: str | list[str] | None = None,
    image: str | list[str] | None = None,
    vectors: np.ndarray | None = None,
    k: int = 50,
    probes: int = 32,
    image_mpp: float = CELL_MPP,
    model: str | None = None,
    index: str | None = None,
) -> pa.Table:
    """The ``k`` cells nearest to each query by cosine, over all slides of an output of ``lemon embed``.

    The index beside the embeddings is made, or brought up to date, first.

    Args:
        embeddings: the output, a folder or s3:// prefix.
        cell: ids of cells among them, which are no neighbours of themselves.
        image: files of pictures with a nucleus in the middle, at ``image_mpp`` um a px.
        vectors: float [N, D] of the same encoder. Exactly one of the three.
        k: neighbours of each.
        probes: lists of the index that are looked through.
        model: with ``image``: the encoder that made the embeddings, where its name no longer leads to it.
        index: folder of the index; None: ``<embeddings>/index``.

    Returns:
        query, position (from 1), cell_id, slide_id, x_level0_px, y_level0_px, distance (1 - cosine, by vectors of
        length one in float16: right to some 0.0001).

    Raises:
        ConfigError: what is given does not do; one line.
    """
    opened = open_embeddings(embeddings)
    if vectors is None:
        words = {"embeddings": embeddings, "cell": cell, "image": image, "k": k, "probes": probes, "model": model}
        try:
            config = FindConfig.model_validate({**words, "image_mpp": image_mpp, "index": index})
        except ValueError as error:
            raise ConfigError(" ".join(str(error).split())) from None
        queries = _queries(opened, config)
    elif cell is not None or image is not None:
        raise ConfigError("got vectors=... and cell=... or image=...; expected exactly one of the three")
    else:
        names = [str(number) for number in range(len(vectors))]
        config = FindConfig(embeddings=embeddings, cell=names, k=k, probes=probes, index=index)
        queries = Queries(names, _checked(vectors, opened), [None] * len(names), [None] * len(names))
    found = neighbours_of(opened, open_index(opened, index), queries, k=config.k, probes=config.probes)
    return pa.concat_tables([rows for rows, _ in found])


def _checked(vectors: np.ndarray, embeddings: Embeddings) -> np.ndarray:
    width = embeddings.spec.width
    if vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors) or not np.isfinite(vectors).all():
        raise ConfigError(f"vectors: got {vectors.dtype} {list(vectors.shape)}; expected finite float [N, {width}]")
    return vectors.astype(np.float32)


def _queries(embeddings: Embeddings, config: FindConfig) -> Queries:
    if config.cell:
        return queries_of_cells(embeddings, config.cell)
    return queries_of_images(embeddings, config.image or [], mpp=config.image_mpp, model=config.model)


def neighbours_of(
    embeddings: Embeddings, index: NeighbourIndex, queries: Queries, *, k: int, probes: int
) -> Iterator[tuple[pa.Table, list[Hit]]]:
    """The ``k`` cells nearest to each query, which is none of its own: as rows of the table, and as hits, in order.

    Raises ConfigError where embeddings cannot be read.
    """
    found = index.search(queries.vectors, k=k + 1, probes=probes)
    for name, place, hits in zip(queries.names, queries.places, found, strict=True):
        others = [hit for hit in hits if (hit.slide_id, hit.row) != place][:k]
        cells = [embeddings.facts(hit.slide_id, hit.row) for hit in others]
        facts = pa.Table.from_batches(cells, schema=_FACTS)
        columns = {
            "query": [name] * len(others),
            "position": np.arange(1, len(others) + 1, dtype=np.int32),
            "slide_id": [hit.slide_id for hit in others],
            "distance": (1 - np.array([hit.similarity for hit in others])).clip(0, 2),
            **{column: facts[column] for column in facts.column_names},
        }
        yield pa.table(columns, schema=NEIGHBOURS), others


def _draw(store: Store, cells: Store, queries: Queries, found: list[tuple[pa.Table, list[Hit]]]) -> None:
    from lemon.find.picture import Neighbours, draw_neighbours  # matplotlib: a second

    drawn = []
    for number, (rows, hits) in enumerate(found):
        place, crop = queries.places[number], queries.crops[number]
        if crop is None and place is not None:
            crop = crop_of_cell(cells, *place, cell_id=queries.names[number])
        ids = rows["cell_id"].to_pylist()
        crops = [crop_of_cell(cells, hit.slide_id, hit.row, cell_id=each) for hit, each in zip(hits, ids, strict=True)]
        assert crop is not None
        drawn.append(
            Neighbours(queries.names[number], crop, crops, rows["slide_id"].to_pylist(), rows["distance"].to_pylist())
        )
    store.write_bytes(PICTURE, draw_neighbours(drawn))
