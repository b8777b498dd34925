"""Results back to where the nuclei came from: vectors, clusters and measures under the ids of another program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa

from lemon.cells.ledger import read_ledger
from lemon.embed.anndata import EMBEDDING, annotate
from lemon.embed.clusters import Clusters
from lemon.embed.ledger import EmbeddingSpec
from lemon.embed.names import CENTRES, SETTINGS
from lemon.embed.slide import EmbeddedSlide
from lemon.errors import ConfigError
from lemon.runtime.identifiers import some
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import SlideRow

if TYPE_CHECKING:
    from anndata import AnnData

Data = TypeVar("Data", "AnnData", pd.DataFrame)

_PREFIX = "lemon_"


def join_embeddings(
    data: Data,
    embeddings: str,
    *,
    cells: str | None = None,
    slide_id: str | None = None,
    on: str | None = None,
) -> Data:
    """Give each nucleus of another program's table what LEMON made of it, by the id that it had in ``cells_from=``.

    To an AnnData are added, in place: ``obsm["X_lemon"]`` (float32 [N, D], NaN for a nucleus that LEMON does not have),
    ``obs["lemon_cell_id"]``, ``obs["lemon_cluster"]`` and ``obs["lemon_<measure>"]``. Of a DataFrame a copy is returned
    with these columns of obs. Of several nuclei with one id, as those of a Xenium cell, the largest counts.

    Args:
        data: AnnData or DataFrame, a row a nucleus or cell.
        embeddings: output of ``lemon embed``.
        cells: output of ``lemon curate``; None: what ``lemon embed slides=`` curated on the way.
        slide_id: which slide the table is of; None where there is one alone.
        on: column that has the ids; None: the index.

    Raises:
        ConfigError: there is no such output or slide, or none of the ids is among the slide's.
    """
    slide = open_slide(embeddings, cells=cells, slide_id=slide_id)
    try:
        facts = annotate(slide).obs
        if "foreign_id" not in facts:
            raise ConfigError(
                f"embeddings: the nuclei of {slide.slide_id} have no ids of another program (cells_from=)"
            )
        vectors = np.concatenate([part.astype(np.float32) for part in slide.vectors()])
    except (ShardError, pa.ArrowException, OSError) as error:
        raise ConfigError(f"embeddings: {' '.join(str(error).split())}") from None
    order = np.argsort(-facts["area_um2"].to_numpy(), kind="stable")
    place = pd.Series(order, index=facts["foreign_id"].to_numpy()[order])
    place = place[~place.index.duplicated()]
    table = data if isinstance(data, pd.DataFrame) else data.obs
    rows = place.reindex(_ids(table, on, known=place.index)).to_numpy()
    found = ~np.isnan(rows)
    added = facts.drop(columns=["foreign_id", "slide_id"]).rename_axis("cell_id").reset_index().add_prefix(_PREFIX)
    joined = added.reindex(rows).set_axis(table.index)
    if isinstance(data, pd.DataFrame):
        return pd.concat([data.drop(columns=[name for name in joined if name in data]), joined], axis=1)
    for name in joined:
        data.obs[name] = joined[name]
    matched = np.full((len(rows), vectors.shape[1]), np.nan, np.float32)
    matched[found] = vectors[rows[found].astype(int)]
    data.obsm[EMBEDDING] = matched
    return data


def open_slide(embeddings: str, *, cells: str | None = None, slide_id: str | None = None) -> EmbeddedSlide:
    """A slide of an output of ``lemon embed``. Raises ConfigError."""
    store = Store(embeddings)
    if not store.exists(SETTINGS):
        raise ConfigError(f"embeddings: {store.uri} has no {SETTINGS}; expected an output of lemon embed")
    table = Store(cells or f"{store.uri}/cells")
    rows = {row.slide_id: row for row in SlideRow.read(read_ledger(table)) if row.n_cells}
    if not rows:
        raise ConfigError(f"cells: {table.uri} holds no cells; expected the output of lemon curate: give cells=")
    if slide_id is None and len(rows) > 1:
        raise ConfigError(
            f"slide_id: got none, and {store.uri} has {len(rows)} slides; expected one of {some(list(rows))}"
        )
    row = rows.get(slide_id or next(iter(rows)))
    if row is None:
        raise ConfigError(f"slide_id: got {slide_id!r}; expected one of {some(list(rows))}")
    clusters: Clusters | None = store.read_json(CENTRES, Clusters) if store.exists(CENTRES) else None
    spec: EmbeddingSpec = store.read_json(SETTINGS, EmbeddingSpec)
    return EmbeddedSlide(
        row.slide_id, row.path, table, store, spec, clusters if clusters and clusters.centres else None
    )


def _ids(table: pd.DataFrame, on: str | None, *, known: pd.Index[Any]) -> list[str]:
    """The ids of a table as text. Raises ConfigError where none is known."""
    if on is not None and on not in table:
        raise ConfigError(f"on: no column {on!r}; it has {some(list(table.columns))}")
    ids = [_text(each) for each in (table.index if on is None else table[on])]
    if known.isin(ids).any():
        return ids
    others = [name for name in table if known.isin([_text(each) for each in table[name]]).any()]
    hint = f"; give on={others[0]!r}, which has them" if others else ""
    where = "the index" if on is None else f"column {on!r}"
    raise ConfigError(f"on: {where} has none of the ids, as {known[0]!r}; it has {some(ids[:3])}{hint}")


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
