"""Arrow schemas of every table on disk. The only place that spells their columns; units are in the names."""

from __future__ import annotations

import json

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


_MADE_BY = {
    "slides": "curate",
    "cells": "curate",
    "embedded": "embed",
    "embeddings": "embed",
    "clusters": "embed",
    "scores": "probe",
    "sweep": "sweep",
    "downloads": "fetch",
    "map": "atlas",
}


def fault_of(found: pa.Schema, expected: pa.Schema) -> str | None:
    """Why a file's schema is not that of the expected table; None where it is."""
    wanted, _, _ = expected.metadata[TABLE].decode().partition("/")
    got, _, version = (found.metadata or {}).get(TABLE, b"").decode().partition("/")
    job = f"the output of lemon {_MADE_BY.get(wanted, wanted)}"
    if not got:
        return f"is no table of lemon's, or of a version before {VERSION}; expected {job} (table {wanted})"
    if got != wanted:
        return f"is the table {got}; expected {job} (table {wanted})"
    if version != str(VERSION):
        mend = "install the lemon that wrote it" if version > str(VERSION) else "make it again in another output"
        return f"is the table {got} of version {version}; this lemon reads version {VERSION}: {mend}"
    return None


VIEW_PX = 40
"""Side of a view: what of a cell's image the encoder sees."""

CELL_PX = 60
"""Side of a cell's image as it is stored. A view needs 40 * sqrt(2) = 56.6 px to turn freely without a black corner."""

CELL_MPP = 0.25
"""Micrometres per pixel of regions and cells, whatever the slide's own resolution."""

CELL_BYTES = CELL_PX * CELL_PX * 3

_IMAGE_METADATA = {"shape": json.dumps([CELL_PX, CELL_PX, 3]), "dtype": "uint8", "um_per_px": str(CELL_MPP)}

COHORT = _table(
    "cohort",
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("project", pa.string()),
        pa.field("organ", pa.string()),
        pa.field("site", pa.string()),
        pa.field("mpp", pa.float64()),
    ],
)
"""Slides to work on, and what is known of each beforehand. ``mpp`` (um/px) outranks what the slide's file says."""

DOWNLOADS = _table(
    "downloads",
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("file_id", pa.string(), nullable=False),
        pa.field("file_name", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("md5", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("total_s", pa.float64(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("code_version", pa.string(), nullable=False),
    ],
)
"""The ledger of downloads: one row a slide, done or failed, written after the file has its name.

``size_bytes`` and ``md5`` are those of the whole file, as announced; ``done`` means that they were found.
"""

SLIDE_STATUSES = ("done", "partial", "failed")

SLIDES = _table(
    "slides",
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("project", pa.string()),
        pa.field("organ", pa.string()),
        pa.field("site", pa.string()),
        pa.field("mpp", pa.float64()),
        pa.field("mpp_assumed", pa.bool_()),
        pa.field("width_px", pa.int64()),
        pa.field("height_px", pa.int64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("n_regions", pa.int64()),
        pa.field("n_failed_regions", pa.int64()),
        pa.field("n_nuclei", pa.int64()),
        pa.field("n_cells", pa.int64()),
        # Not in the first design: crops that reach over the slide's edge and were filled with white.
        pa.field("n_edge_cells", pa.int64()),
        pa.field("open_s", pa.float64()),
        pa.field("read_s", pa.float64()),
        pa.field("network_s", pa.float64()),
        pa.field("instances_s", pa.float64()),
        pa.field("write_s", pa.float64()),
        pa.field("total_s", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("source_size_bytes", pa.int64()),
        pa.field("source_mtime_ns", pa.int64()),
        pa.field("source_digest", pa.string()),
        pa.field("mask_digest", pa.string()),
        pa.field("cells_digest", pa.string()),
        pa.field("config_fingerprint", pa.string(), nullable=False),
        pa.field("code_version", pa.string(), nullable=False),
    ],
)
"""The ledger: one row a slide, written last, so that a row means that the slide's cells are complete.

``read_s``, ``network_s`` and ``instances_s`` are summed over threads and processes, so they may exceed ``total_s``.
``source_*`` is the slide's file as it was read, ``mask_digest`` the tissue mask that was given for it; ``cells_digest``
is that of the rows of the slide's shard. Null where there is none.
"""

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
        pa.field("image", pa.binary(CELL_BYTES), nullable=False, metadata=_IMAGE_METADATA),
    ],
)
"""One row a nucleus. ``mpp`` is the slide's own; ``polygon`` is WKB in level-0 px; ``rank`` is uniform in [0, 1)."""


MORPHOMETRICS = ("area_um2", "eccentricity", "solidity", "hematoxylin_od_mean")
"""What the cells table measures of each nucleus."""


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

EMBEDDED = _table(
    "embedded",
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("n_cells", pa.int64()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_fingerprint", pa.string(), nullable=False),
        pa.field("cells_digest", pa.string()),
        pa.field("embeddings_digest", pa.string()),
        pa.field("total_s", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("code_version", pa.string(), nullable=False),
    ],
)
"""The ledger of embedding: one row a slide, written after its embeddings; ``partial`` lacks a format."""

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

SCORES = _table(
    "scores",
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("fold", pa.int32(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64()),
        pa.field("n", pa.int64()),
        pa.field("seed", pa.int64()),
        pa.field("model_fingerprint", pa.string()),
        pa.field("data_fingerprint", pa.string()),
    ],
)

SWEEP = _table(
    "sweep",
    [
        pa.field("study", pa.string(), nullable=False),
        pa.field("point", pa.string(), nullable=False),
        pa.field("value", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("trial", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("task", pa.string()),
        pa.field("protocol", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("mean", pa.float64()),
        pa.field("spread", pa.float64()),
        pa.field("n_cells", pa.int64()),
        pa.field("n_slides", pa.int64()),
        pa.field("n_organs", pa.int64()),
        pa.field("config_fingerprint", pa.string()),
        pa.field("cells_fingerprint", pa.string()),
        pa.field("model_fingerprint", pa.string()),
        pa.field("data_fingerprint", pa.string()),
        pa.field("run_id", pa.string()),
    ],
)
"""A sweep: one row a trial, task, protocol and metric; a trial without a result has one row, with its reason.

``mean`` and ``spread`` are over folds.
"""

SWEEP_FILE = "sweep.parquet"
"""That table in the output of a sweep."""
