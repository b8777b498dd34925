"""Arrow schemas of every table on disk. The only place that spells their columns; units are in the names."""

from __future__ import annotations

import json

import pyarrow as pa

CROP_PX = 60
"""Side of a stored crop. A 40 px view needs 40 * sqrt(2) = 56.6 px to turn freely without a black corner."""

CROP_MPP = 0.25
"""Micrometres per pixel of regions and crops, whatever the slide's own resolution."""

CROP_BYTES = CROP_PX * CROP_PX * 3

_IMAGE_METADATA = {"shape": json.dumps([CROP_PX, CROP_PX, 3]), "dtype": "uint8", "um_per_px": str(CROP_MPP)}

COHORT = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("patient_id", pa.string()),
        pa.field("project", pa.string()),
        pa.field("organ", pa.string()),
        pa.field("site", pa.string()),
    ]
)
"""Slides to work on, and what is known of each beforehand."""

DOWNLOADS = pa.schema(
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
    ]
)
"""The ledger of downloads: one row a slide, done or failed, written after the file has its name.

``size_bytes`` and ``md5`` are those of the whole file, as announced; ``done`` means that they were found.
"""

SLIDE_STATUSES = ("done", "partial", "failed")

SLIDES = pa.schema(
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
        pa.field("config_fingerprint", pa.string(), nullable=False),
        pa.field("code_version", pa.string(), nullable=False),
    ]
)
"""The ledger: one row a slide, written last, so that a row means that the slide's cells are complete.

``read_s``, ``network_s`` and ``instances_s`` are summed over threads and processes, so they may exceed ``total_s``.
"""

CELLS = pa.schema(
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
        pa.field("image", pa.binary(CROP_BYTES), nullable=False, metadata=_IMAGE_METADATA),
    ]
)
"""One row a nucleus. ``mpp`` is the slide's own; ``polygon`` is WKB in level-0 px; ``rank`` is uniform in [0, 1)."""


MORPHOMETRICS = ("area_um2", "eccentricity", "solidity", "hematoxylin_od_mean")
"""What the cells table measures of each nucleus."""


def embeddings(width: int, *, dtype: pa.DataType | None = None) -> pa.Schema:
    """Schema of an embeddings table whose vectors have ``width`` values (float16 unless told otherwise)."""
    return pa.schema(
        [
            pa.field("cell_id", pa.string(), nullable=False),
            pa.field("slide_id", pa.string(), nullable=False),
            pa.field("x_level0_px", pa.float64(), nullable=False),
            pa.field("y_level0_px", pa.float64(), nullable=False),
            pa.field("embedding", pa.list_(dtype or pa.float16(), width), nullable=False),
            pa.field("model_fingerprint", pa.string(), nullable=False),
        ]
    )


EMBEDDED = pa.schema(
    [
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("n_cells", pa.int64()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_fingerprint", pa.string(), nullable=False),
        pa.field("cells_fingerprint", pa.string()),
        pa.field("total_s", pa.float64()),
        pa.field("error", pa.string()),
        pa.field("code_version", pa.string(), nullable=False),
    ]
)
"""The ledger of embedding: one row a slide, written after its embeddings; ``partial`` lacks a format."""

CLUSTERS = pa.schema(
    [pa.field("cell_id", pa.string(), nullable=False), pa.field("cluster", pa.int16(), nullable=False)]
)
"""The cluster of each of a slide's cells, in the order of its embeddings."""

MAP = pa.schema(
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
    ]
)
"""Where each cell lies on the map (no unit), in the order of rank."""

SCORES = pa.schema(
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
    ]
)

SWEEP = pa.schema(
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
    ]
)
"""A sweep: one row a trial, task, protocol and metric; a trial without a result has one row, with its reason.

``mean`` and ``spread`` are over folds.
"""

SWEEP_FILE = "sweep.parquet"
"""That table in the output of a sweep."""
