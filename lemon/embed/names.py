"""Names of files in the output of embedding; its ledger and its GeoJSON have the names that curation gives."""

from __future__ import annotations

from lemon.runtime.identifiers import file_stem

SETTINGS = "embed.json"
CENTRES = "clusters.json"

DERIVED = ("clusters", "h5ad", "geojson", "spatialdata")
"""Folders of what is made from embeddings and clusters."""

FOLDERS = ("slides", "embeddings", "morphometry", *DERIVED)
"""Folders of embedding in its output."""


def embeddings_name(slide_id: str) -> str:
    """A slide's embeddings, in the order of its shard of cells."""
    return f"embeddings/{file_stem(slide_id)}.parquet"


def clusters_name(slide_id: str) -> str:
    """The cluster of each of a slide's cells, in the same order."""
    return f"clusters/{file_stem(slide_id)}.parquet"


def morphometry_name(slide_id: str) -> str:
    """What is measured of each of a slide's cells, in the same order."""
    return f"morphometry/{file_stem(slide_id)}.parquet"


def h5ad_name(slide_id: str) -> str:
    """A slide for scanpy."""
    return f"h5ad/{file_stem(slide_id)}.h5ad"


def spatialdata_name(slide_id: str) -> str:
    """A slide's SpatialData store: a folder."""
    return f"spatialdata/{file_stem(slide_id)}.zarr"
