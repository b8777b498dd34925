"""The labels that a user gives, of cells or of clusters, as vectors with classes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lemon.cells.names import shard_name
from lemon.embed.names import clusters_name
from lemon.embed.read import Embeddings
from lemon.errors import ConfigError
from lemon.runtime.identifiers import look_alikes_line, some
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import Store
from lemon.runtime.tables import Column, Form, UserTable, read_user_table
from lemon.schema import CELLS

logger = logging.getLogger(__name__)

CELLS_A_CLUSTER = 100
"""Of a named cluster so many cells, drawn at random, are taken for labelled."""

UNKNOWN = "unknown"
"""The class of what is like no label; not a label itself."""

_DASHES = frozenset(["-", "--"])  # a class, beside +
_COLUMNS = (
    Column("cell_id", required=False),
    Column("foreign_id", required=False),
    Column("cluster", required=False),
    Column("label", required=False, keep=_DASHES),
    Column("name", required=False, keep=_DASHES),
)


@dataclass(frozen=True)
class Labelled:
    """Cells with a class, in the order of their ids.

    ``codes`` int [N] point into ``names``; ``by_cell`` bool [N] is false where only the cluster was named.
    """

    names: tuple[str, ...]
    cell_ids: list[str]
    slide_ids: np.ndarray
    vectors: np.ndarray  # float32 [N, D]
    codes: np.ndarray
    by_cell: np.ndarray

    @property
    def given(self) -> dict[str, str]:
        """The label of each cell that was labelled itself."""
        known = zip(self.cell_ids, self.codes.tolist(), self.by_cell.tolist(), strict=True)
        return {cell_id: self.names[code] for cell_id, code, by_cell in known if by_cell}


def read_labelled(paths: Sequence[str], embeddings: Embeddings, cells: Store | None) -> Labelled:
    """The labels of some tables with the vectors of their cells; where tables differ, the later is right.

    ``cells`` are needed where tables name nuclei by the ids that they had in ``cells_from=``.

    Raises ConfigError: a table is none, names a cell or cluster that there is not, or there is one class alone.
    """
    labels: dict[str, str] = {}
    clusters: dict[str, str] = {}
    for path in paths:
        table = read_user_table(path, form=Form("labels:", _COLUMNS, others=True))
        keys, names = _columns_of(table)
        if keys == "cluster":
            clusters |= _named(table, keys, names)
        else:
            named = _named(table, keys, names)
            labels |= named if keys == "cell_id" else _by_cell_id(named, embeddings, cells)
    places = embeddings.find(labels)
    absent = [cell_id for cell_id in labels if cell_id not in places]
    if absent:
        raise ConfigError(
            f"labels: {len(absent):,} of {len(labels):,} labelled cells are not among the {embeddings.n_cells:,} of "
            f"{embeddings.store.uri} ({some(absent)}); expected ids of its tables"
        )
    rows = [(cell_id, *places[cell_id], labels[cell_id], True) for cell_id in labels]
    rows += [row for row in _of_clusters(clusters, embeddings) if row[0] not in labels]
    return _checked(sorted(rows), embeddings, paths)


def _columns_of(table: UserTable) -> tuple[str, str]:
    """What is labelled in a table, and the column of its classes."""
    keys = [name for name in ("cell_id", "foreign_id", "cluster") if name in table.columns]
    names = [name for name in ("label", "name") if name in table.columns]
    if not keys or not names:
        raise ConfigError(
            f"{table.place}: has no {'label' if keys else 'cell_id'}; "
            "expected cell_id,label or foreign_id,label or cluster,label"
        )
    return keys[0], names[0]


def _named(table: UserTable, keys: str, names: str) -> dict[str, str]:
    """The class of each cell or cluster; those without are left out."""
    labels: dict[str, str] = {}
    for index, (key, name) in enumerate(zip(table.columns[keys], table.columns[names], strict=True)):
        if name is None:
            continue
        if key is None:
            raise ConfigError(f"{table.where(index)}: {name} of no {keys}; expected a value: mend the row")
        if labels.setdefault(key, name) != name:
            where = f"{table.where(index)}: {keys} {key} has two labels, {labels[key]} and {name}"
            raise ConfigError(f"{where}; expected one row each")
    return labels


def _by_cell_id(labels: dict[str, str], embeddings: Embeddings, cells: Store | None) -> dict[str, str]:
    """Labels by foreign id as labels by cell id; of several nuclei with one id, as those of a Xenium cell, each has it.

    Raises ConfigError where an id is of no slide, or of several.
    """
    if cells is None:
        raise ConfigError("labels: name foreign_id, which cells have; expected cells=the output of lemon curate")
    found: dict[str, dict[str, list[str]]] = {}  # foreign id -> slide -> cell ids
    for slide_id in embeddings.rows:
        for cell_id, foreign_id in zip(*foreign_ids_of(cells, slide_id), strict=True):
            if foreign_id in labels:
                found.setdefault(foreign_id, {}).setdefault(slide_id, []).append(cell_id)
    absent = [foreign_id for foreign_id in labels if foreign_id not in found]
    if absent:
        raise ConfigError(
            f"labels: {len(absent):,} of {len(labels):,} foreign ids are not among those of {cells.uri} "
            f"({some(absent)}); expected ids of the nuclei given by cells_from="
        )
    for foreign_id, slides in found.items():
        if len(slides) > 1:
            raise ConfigError(
                f"labels: foreign_id {foreign_id} is of {len(slides)} slides ({some(list(slides))}); "
                "expected ids of one slide each: give cell_id instead"
            )
    nuclei = {foreign_id: ids for foreign_id, slides in found.items() for ids in slides.values()}
    return {cell_id: labels[foreign_id] for foreign_id, ids in nuclei.items() for cell_id in ids}


def foreign_ids_of(cells: Store, slide_id: str) -> tuple[list[str], list[str | None]]:
    """Each cell's id, and its id in ``cells_from=``, of a slide, in order. Raises ConfigError."""
    ids: list[str] = []
    foreign: list[str | None] = []
    try:
        for batch in read_shard(cells, shard_name(slide_id), schema=CELLS, columns=["cell_id", "foreign_id"]):
            ids += batch["cell_id"].to_pylist()
            foreign += batch["foreign_id"].to_pylist()
    except ShardError as error:
        raise ConfigError(f"cells: {cells.uri}/{error}") from None
    return ids, foreign


def _of_clusters(clusters: dict[str, str], embeddings: Embeddings) -> Iterator[tuple[str, str, int, str, bool]]:
    """Cells of named clusters: the first of each slide in turn, which are drawn at random. Raises ConfigError."""
    if not clusters:
        return
    counts: Counter[str] = Counter()
    share = -(-CELLS_A_CLUSTER // len(embeddings.rows))
    for slide_id in embeddings.rows:
        if not embeddings.store.exists(clusters_name(slide_id)):
            raise ConfigError(
                f"labels: name clusters, but {embeddings.store.uri} has no {clusters_name(slide_id)}; "
                "expected an output of lemon embed with clusters.k"
            )
        table = embeddings.store.read_table(clusters_name(slide_id))
        ids, codes = table["cell_id"], table["cluster"].to_numpy().astype(str)
        for cluster, name in clusters.items():
            rows = np.flatnonzero(codes == cluster)[:share].tolist()
            counts[cluster] += len(rows)
            yield from ((ids[row].as_py(), slide_id, row, name, False) for row in rows)
    empty = [cluster for cluster in clusters if not counts[cluster]]
    if empty:
        raise ConfigError(
            f"labels: no cell is in cluster {empty[0]}; expected numbers as in clusters/ of the embeddings"
        )


def _checked(rows: list[tuple[str, str, int, str, bool]], embeddings: Embeddings, paths: Sequence[str]) -> Labelled:
    names = tuple(sorted({row[3] for row in rows}))
    where = ", ".join(paths)
    if not rows:
        raise ConfigError(f"labels: {where}: no cell has a label; expected some of two classes at least")
    if UNKNOWN in {name.casefold() for name in names}:
        raise ConfigError(f"labels: {where}: {UNKNOWN!r} is no class, cells unlike all labels get it; leave them empty")
    if len(names) < 2:
        raise ConfigError(f"labels: {where}: {len(rows)} cells, all {names[0]}; expected cells of two classes at least")
    if line := look_alikes_line("labels: label", set(names)):
        logger.warning("%s", line)
    code = {name: index for index, name in enumerate(names)}
    return Labelled(
        names,
        [row[0] for row in rows],
        np.array([row[1] for row in rows], str),
        embeddings.take([(slide_id, row) for _, slide_id, row, _, _ in rows]),
        np.array([code[row[3]] for row in rows], np.int64),
        np.array([row[4] for row in rows], bool),
    )
