"""Arrow schemas of every table on disk. The only place that spells their columns; units are in the names.

A table of few rows, such as a ledger, is a dataclass of its row, which its schema is made of; a table of cells, whose
columns are arrays, is a schema alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa

VERSION = 2
"""Of all tables below; those of version 1 had no mark. Tables of another version are refused, in one line."""

TABLE = b"lemon.table"
"""Key in a Parquet file's metadata: which table it is, and of which version."""

DIGEST = b"lemon.digest"
"""Key in a shard's metadata: SHA-256 of its rows (lemon.runtime.shards)."""


def marked(schema: pa.Schema, **more: str) -> pa.Schema:
    """A schema with further entries in its metadata."""
    known = dict(schema.metadata or {})
    return schema.with_metadata(known | {key.encode(): value.encode() for key, value in more.items()})


def _table(name: str, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={TABLE: f"{name}/{VERSION}"})


_BY_LEDGER = ""
"""Of a column that a ledger fills in when it commits a row."""

T = TypeVar("T")

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)

_NULLABLE = "nullable"

Filled = Annotated[T, _NULLABLE]
"""Of a column that may be null by its schema, and that no job leaves so."""

_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _column(name: str, hint: Any) -> pa.Field:
    """The column of a field: ``X``; ``X | None``, which may be null; ``Annotated[X, type]``, of no usual type."""
    plain, *more = get_args(hint) or (hint,)
    of = next((each for each in more if isinstance(each, pa.DataType)), _TYPES[plain])
    return pa.field(name, of, nullable=NoneType in more or _NULLABLE in more)


class Row:
    """A row of a table: a frozen dataclass with a field for each column, in their order."""

    schema: ClassVar[pa.Schema]

    def __init_subclass__(cls, *, table: str) -> None:
        hints = get_type_hints(cls, include_extras=True)
        columns = [_column(name, hint) for name, hint in hints.items() if get_origin(hint) is not ClassVar]
        cls.schema = _table(table, columns)

    @classmethod
    def read(cls, table: pa.Table) -> list[Self]:
        """The rows of a table, whose columns may have another order. Raises KeyError where it lacks one."""
        return [cls(**row) for row in table.select(cls.schema.names).to_pylist()]

    @classmethod
    def table(cls, rows: Iterable[Self]) -> pa.Table:
        """Rows as a table."""
        return pa.Table.from_pylist([vars(row) for row in rows], schema=cls.schema)


_MADE_BY = {
    "slides": "curate",
    "cells": "curate",
    "embedded": "embed",
    "embeddings": "embed",
    "clusters": "embed",
    "morphometry": "embed",
    "scores": "probe",
    "robustness": "probe",
    "sweep": "sweep",
    "downloads": "fetch",
    "map": "atlas",
    "neighbours": "find",
    "classes": "classify",
    "counts": "classify",
    "neighbourhood": "classify",
}


def with_absent(rows: Rows, expected: pa.Schema) -> Rows:
    """Rows with the columns of a schema that they lack as nulls, where it allows that: those of an earlier version."""
    for field in expected:
        if field.nullable and field.name not in rows.schema.names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    return rows


def fault_of(got_schema: pa.Schema, expected: pa.Schema) -> str | None:
    """Why a file's schema is not that of the expected table; None where it is."""
    expected_table, _, _ = expected.metadata[TABLE].decode().partition("/")
    got, _, version = (got_schema.metadata or {}).get(TABLE, b"").decode().partition("/")
    job = f"the output of lemon {_MADE_BY.get(expected_table, expected_table)}"
    if not got:
        return f"is no table of lemon's, or of a version before {VERSION}; expected {job} (table {expected_table})"
    if got != expected_table:
        return f"is the table {got}; expected {job} (table {expected_table})"
    if version != str(VERSION):
        remedy = "install the lemon that wrote it" if version > str(VERSION) else "make it again in another output"
        return f"is the table {got} of version {version}; this lemon reads version {VERSION}: {remedy}"
    return None


VIEW_PX = 40
"""Side of a view: what of a cell's image the encoder sees."""

CELL_PX = 60
"""Side of a cell's image as it is stored. A view needs 40 * sqrt(2) = 56.6 px to turn freely without a black corner."""

CELL_MPP = 0.25
"""Micrometres per pixel of regions and cells, whatever the slide's own resolution."""

CELL_BYTES = CELL_PX * CELL_PX * 3

_IMAGE_METADATA = {"shape": json.dumps([CELL_PX, CELL_PX, 3]), "dtype": "uint8", "um_per_px": str(CELL_MPP)}


@dataclass(frozen=True)
class Slide(Row, table="cohort"):
    """A slide to work on, and what is known of it beforehand. ``mpp`` (um/px) outranks what the slide's file says."""

    slide_id: str
    path: str
    patient_id: str | None = None
    project: str | None = None
    organ: str | None = None
    site: str | None = None
    mpp: float | None = None


@dataclass(frozen=True, kw_only=True)
class DownloadRow(Row, table="downloads"):
    """The ledger of downloads: one row a slide, done or failed, written after the file has its name.

    ``size_bytes`` and ``md5`` are those of the whole file, as announced; ``done`` means that they were found.
    """

    slide_id: str
    file_id: str
    file_name: str
    url: str
    size_bytes: int
    md5: str
    status: str
    total_s: float
    error: str | None = None
    code_version: str = _BY_LEDGER


SLIDE_STATUSES = ("done", "partial", "failed")


@dataclass(frozen=True, kw_only=True)
class SlideRow(Slide, table="slides"):
    """The ledger of curation: one row a slide, written last, so that a row means that the slide's cells are complete.

    ``pen_share`` and ``fold_share`` are of the tissue, left out or not, ``blurred_share`` is of the regions that are
    looked at first, to calibrate on. ``read_s`` and ``instances_s`` are summed over threads and processes, so they may
    exceed ``total_s``.
    ``area_mm2`` is that of the regions with tissue, without their overlap, ``s_per_mm2`` is ``total_s`` over it,
    ``device_share`` the share of ``total_s`` in which the network computed, ``peak_mib`` the highest resident size of
    the actor's process until then, without its worker processes.
    ``source_*`` is the slide's file as it was read, ``mask_digest`` the tissue mask that was given for it;
    ``cells_digest`` is that of the rows of the slide's shard. Null where there is none.
    """

    mpp_assumed: bool | None = None
    width_px: int | None = None
    height_px: int | None = None
    status: str
    n_regions: int | None = None
    n_failed_regions: int | None = None
    n_nuclei: int | None = None
    n_cells: Filled[int]
    # Not in the first design: crops that reach over the slide's edge and were filled with white.
    n_edge_cells: int | None = None
    # Not in the first design: shares of the tissue that lemon.slides.quality finds no good.
    pen_share: float | None = None
    fold_share: float | None = None
    blurred_share: float | None = None
    open_s: float | None = None
    read_s: float | None = None
    network_s: float | None = None
    instances_s: float | None = None
    write_s: float | None = None
    total_s: float | None = None
    area_mm2: float | None = None
    s_per_mm2: float | None = None
    device_share: float | None = None
    peak_mib: float | None = None
    error: str | None = None
    source_size_bytes: int | None = None
    source_mtime_ns: int | None = None
    source_digest: str | None = None
    mask_digest: str | None = None
    # Of the file of nuclei, where another program found them (cells_from=).
    nuclei_digest: str | None = None
    cells_digest: str | None = None
    config_fingerprint: str = _BY_LEDGER
    code_version: str = _BY_LEDGER


CELLS = _table(
    "cells",
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("organ", pa.string()),
        pa.field("site", pa.string()),
        pa.field("x_level0_px", pa.float64(), nullable=False),
        pa.field("y_level0_px", pa.float64(), nullable=False),
        pa.field("mpp", pa.float64(), nullable=False),
        pa.field("area_um2", pa.float32(), nullable=False),
        pa.field("eccentricity", pa.float32(), nullable=False),
        pa.field("solidity", pa.float32(), nullable=False),
        pa.field("hematoxylin_od_mean", pa.float32(), nullable=False),
        pa.field("polygon", pa.binary(), nullable=False),
        pa.field("rank", pa.float64(), nullable=False),
        pa.field("foreign_id", pa.string()),
        pa.field("foreign_class", pa.string()),
        pa.field("foreign_probability", pa.float32()),
        pa.field("focus", pa.float32()),
        pa.field("image", pa.binary(CELL_BYTES), nullable=False, metadata=_IMAGE_METADATA),
    ],
)
"""One row a nucleus. ``mpp`` is the slide's own; ``polygon`` is WKB in level-0 px; ``rank`` is uniform in [0, 1).

``foreign_*`` is what the program says that found it, of nuclei given by ``cells_from=``; null of others. ``focus`` is
how sharp the image is (``lemon.slides.quality.focus_of_crops``), null where nothing in it could be. Tables that were
written before there were these columns are read as if they were null.
"""

FOREIGN = ("foreign_id", "foreign_class", "foreign_probability")


MORPHOMETRICS = ("area_um2", "eccentricity", "solidity", "hematoxylin_od_mean")
"""What the cells table measures of each nucleus."""

FOCUS = "focus"
"""What the cells table measures of each image: a flaw of the scan, no trait of the nucleus."""


MORPHOMETRY = _table(
    "morphometry",
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("perimeter_um", pa.float32()),
        pa.field("major_axis_um", pa.float32()),
        pa.field("minor_axis_um", pa.float32()),
        pa.field("circularity", pa.float32()),
        pa.field("hematoxylin_od_sd", pa.float32()),
        pa.field("hematoxylin_od_contrast", pa.float32()),
        pa.field("eosin_od_mean", pa.float32()),
        pa.field("gradient_od_um", pa.float32()),
        pa.field("glcm_contrast", pa.float32()),
        pa.field("glcm_homogeneity", pa.float32()),
        pa.field("glcm_correlation", pa.float32()),
        pa.field("glcm_entropy", pa.float32()),
        pa.field("nearest_um", pa.float32()),
        pa.field("nearest_5_um", pa.float32()),
        pa.field("density_per_mm2", pa.float32()),
    ],
)
"""What is measured of each nucleus beside MORPHOMETRICS (lemon.cells.morphometry says how), in the order of its cells.

NaN where a nucleus has no pixel; the last three are NaN where only a sample of a slide's nuclei was kept.
"""


def embeddings(width: int, *, dtype: pa.DataType | None = None) -> pa.Schema:
    """Schema of an embeddings table whose vectors have ``width`` values (float16 unless told otherwise)."""
    return _table(
        "embeddings",
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("slide_id", pa.string(), nullable=False),
            pa.field("x_level0_px", pa.float64(), nullable=False),
            pa.field("y_level0_px", pa.float64(), nullable=False),
            pa.field("embedding", pa.list_(dtype or pa.float16(), width), nullable=False),
            pa.field("model_fingerprint", pa.string(), nullable=False),
        ],
    )


EMBEDDINGS = embeddings(1)
"""Stands for embeddings of any width where only the table's mark is compared."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedRow(Row, table="embedded"):
    """The ledger of embedding: one row a slide, written after its embeddings; ``partial`` lacks a format."""

    slide_id: str
    status: str
    n_cells: Filled[int]
    model: str = _BY_LEDGER
    model_fingerprint: str = _BY_LEDGER
    cells_digest: str | None = None
    embeddings_digest: str | None = None
    total_s: float | None = None
    error: str | None = None
    code_version: str = _BY_LEDGER


CLUSTERS = _table(
    "clusters", [pa.field("cell_id", pa.string(), nullable=False), pa.field("cluster", pa.int16(), nullable=False)]
)
"""The cluster of each of a slide's cells, in the order of its embeddings."""

MAP = _table(
    "map",
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
    ],
)
"""Where each cell lies on the map (no unit), in the order of rank."""

NEIGHBOURS = _table(
    "neighbours",
    [
        pa.field("query", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("x_level0_px", pa.float64(), nullable=False),
        pa.field("y_level0_px", pa.float64(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
    ],
)
"""The nearest cells of each query, from position 1 on; ``distance`` is 1 - cosine of the embeddings."""

CLASSES = _table(
    "classes",
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("likely", pa.string(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("distance", pa.float32(), nullable=False),
        pa.field("given", pa.bool_(), nullable=False),
        pa.field("foreign_id", pa.string()),
    ],
)
"""The class of each of a slide's cells, in the order of its embeddings, with the id that it had in ``cells_from=``.

``label`` is the one that was given, else ``likely``, the class of the largest probability (``confidence``), or
``unknown`` where ``distance``, 1 - cosine to the nearest labelled cell, is beyond the limit.
"""


@dataclass(frozen=True, kw_only=True)
class CountRow(Row, table="counts"):
    """Cells of a class on a slide. The area is that of squares of 100 um that hold a nucleus; null without cells."""

    slide_id: str
    label: str
    n_cells: int
    share: float
    area_mm2: float | None = None
    per_mm2: float | None = None


@dataclass(frozen=True, kw_only=True)
class NeighbourhoodRow(Row, table="neighbourhood"):
    """How many of the nearest nuclei around cells of a class are of another.

    ``share`` is that of ``neighbour`` among them; ``ratio`` is to its share of the slide's cells.
    """

    slide_id: str
    label: str
    neighbour: str
    n_neighbours: int
    share: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class ScoreRow(Row, table="scores"):
    """One value of a metric: of an encoder on a task, by a protocol, in a fold (-1: over all)."""

    model: str
    task: str
    protocol: str
    fold: Annotated[int, pa.int32()]
    metric: str
    value: Filled[float]
    n: Filled[int]
    seed: Filled[int]
    model_fingerprint: Filled[str]
    data_fingerprint: Filled[str]


@dataclass(frozen=True, kw_only=True)
class RobustnessRow(Row, table="robustness"):
    """One measure of an encoder's robustness on a task; the cards of ``lemon probe`` are made of them.

    ``low`` and ``high`` bound the 95 % interval over slides, where there is one. ``chance`` is what embeddings without
    any information get, where that is known. ``n`` counts nuclei, ``n_batches`` hospitals, scanners or sites.
    """

    model: str
    model_fingerprint: str
    task: str
    measure: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    n: int
    n_batches: int | None = None
    data_fingerprint: str


@dataclass(frozen=True, kw_only=True)
class SweepRow(Row, table="sweep"):
    """A sweep: one row a trial, task, protocol and metric; a trial without a result has one row, with its reason.

    ``point`` and ``value`` are what was varied, ``seed`` that of training, ``trial`` a folder below ``trials/``;
    ``status`` is done, failed or stopped (by ASHA). ``mean`` and ``spread`` are over folds (spread is null for a single
    value), ``n_*`` what was selected, ``encoder`` the name of the trial's.
    """

    study: str
    point: str
    value: str
    seed: int
    trial: str
    status: str
    error: str | None = None
    task: str | None = None
    protocol: str | None = None
    metric: str | None = None
    mean: float | None = None
    spread: float | None = None
    n_cells: int | None = None
    n_slides: int | None = None
    n_organs: int | None = None
    config_fingerprint: str | None = None
    cells_fingerprint: str | None = None
    model_fingerprint: str | None = None
    data_fingerprint: str | None = None
    run_id: str | None = None
    encoder: str | None = None


COHORT, DOWNLOADS, SLIDES = Slide.schema, DownloadRow.schema, SlideRow.schema
EMBEDDED, SCORES, SWEEP = EmbeddedRow.schema, ScoreRow.schema, SweepRow.schema
ROBUSTNESS = RobustnessRow.schema
COUNTS, NEIGHBOURHOOD = CountRow.schema, NeighbourhoodRow.schema

SWEEP_FILE = "sweep.parquet"
"""That table in the output of a sweep."""
