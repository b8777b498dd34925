"""Counts of transcripts per cell out of HEST's raw Xenium tables, one block of rows at a time.

``<id>_transcripts.parquet`` has a row a transcript (tens of millions): cell_id, feature_name, qv, and in newer files
is_gene. ``<id>_xenium_cell_seg.parquet`` is GeoParquet: WKB polygons in level-0 px of the H&E slide, ids as index.
Ids and names are bytes, integers or text, by the version of the instrument's software: text here. A transcript counts
if its cell is in the segmentation (UNASSIGNED, -1 and the like are not), its feature is a gene and its quality is
``MIN_QV`` or more, as in 10x Genomics' own matrices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from scipy.sparse import coo_array, csr_array

from lemon.probe.task import TaskError

MIN_QV = 20.0
BATCH_ROWS = 1 << 21

_CONTROL = re.compile(
    r"^(neg_?control|negative|negprb|antisense|blank[-_]|unassigned|deprecated|intergenic|genomic_?control)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Expression:
    """Counts of C cells and G genes, and what became of the transcripts."""

    genes: np.ndarray  # str [G], sorted: the slide's panel
    counts: csr_array  # [C, G] int64
    n_transcripts: int
    n_counted: int


def read_centroids(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ids str [C], sorted, and centroids float64 [C, 2] (x, y in level-0 px) of the segmented cells.

    Raises TaskError where the file is absent or is not in the form that the module's head states.
    """
    table = _open(path).read()
    metadata = table.schema.metadata or {}
    geometry = json.loads(metadata.get(b"geo", b"{}")).get("primary_column", "geometry")
    index = [
        name for name in json.loads(metadata.get(b"pandas", b"{}")).get("index_columns", []) if isinstance(name, str)
    ]
    named = [name for name in (*index, "cell_id", "__index_level_0__") if name in table.column_names]
    if geometry not in table.column_names or not named:
        has = ", ".join(table.column_names)
        raise TaskError(
            f"{path}: it has {has}; expected polygons in {geometry!r} and cell ids in the index: download it again"
        )
    centroid = shapely.centroid(shapely.from_wkb(table[geometry].to_numpy(zero_copy_only=False)))
    centre = np.stack([shapely.get_x(centroid), shapely.get_y(centroid)], axis=1)
    ids, first = np.unique(np.array(as_text(table[named[0]]).to_pylist(), str), return_index=True)
    centre = centre[first]
    real = np.isfinite(centre).all(axis=1)  # an empty polygon has no centroid
    return ids[real], centre[real]


def count_transcripts(path: Path, cell_ids: np.ndarray, *, min_qv: float = MIN_QV) -> Expression:
    """Counts per cell of ``cell_ids`` str [C] and gene.

    Raises TaskError where the file is absent, lacks a column, or names none of the cells.
    """
    file = _open(path)
    absent = [name for name in ("cell_id", "feature_name", "qv") if name not in file.schema_arrow.names]
    if absent:
        has = ", ".join(file.schema_arrow.names)
        raise TaskError(f"{path}: no column {absent[0]!r}; it has {has}; expected a Xenium table of transcripts")
    genes = _panel(file)
    known_cells, known_genes = pa.array(cell_ids.tolist(), pa.string()), pa.array(genes.tolist(), pa.string())
    counts = csr_array((len(cell_ids), len(genes)), dtype=np.int64)
    some_id = None
    for batch in _batches(file, ["cell_id", "feature_name", "qv"]):
        cells = as_text(batch["cell_id"])
        some_id = cells[0].as_py() if some_id is None and len(cells) else some_id
        cell, gene = pc.index_in(cells, known_cells), pc.index_in(as_text(batch["feature_name"]), known_genes)
        used = pc.and_(pc.and_(pc.is_valid(cell), pc.is_valid(gene)), pc.greater_equal(batch["qv"], min_qv))
        used = pc.fill_null(used, False)
        place = cell.filter(used).to_numpy(), gene.filter(used).to_numpy()
        counts = counts + coo_array((np.ones(len(place[0]), np.int64), place), shape=counts.shape).tocsr()
    n_counted = int(counts.sum())
    if not n_counted:
        example = str(cell_ids[0]) if len(cell_ids) else "none"
        raise TaskError(
            f"{path}: no transcript counts: its cells are like {some_id!r}, those of the segmentation {example!r}"
        )
    return Expression(genes, counts, file.metadata.num_rows, n_counted)


def is_control(name: str) -> bool:
    """Whether a feature is a control or an unused code word, not a gene."""
    return _CONTROL.match(name) is not None


def as_text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of bytes, integers, text, or a dictionary of those, as text."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string())


def _panel(file: pq.ParquetFile) -> np.ndarray:
    """Genes that occur in a file, whatever their quality: str [G], sorted."""
    has_flag = "is_gene" in file.schema_arrow.names
    names: set[str] = set()
    for batch in _batches(file, ["feature_name", *(["is_gene"] if has_flag else [])]):
        features = as_text(batch["feature_name"])
        if has_flag:
            features = features.filter(pc.fill_null(batch["is_gene"].cast(pa.bool_()), False))
        names.update(pc.unique(features).to_pylist())
    return np.array(sorted(name for name in names if name and not is_control(name)), str)


def _batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):  # over several, pyarrow keeps what it has read: see Store.iter_batches
        yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise TaskError(f"{path}: cannot be read ({error}); expected a Parquet file: download it again") from None
