"""Names of files in the output of curation."""

from __future__ import annotations

from lemon.runtime.identifiers import file_stem

SETTINGS = "curate.json"

FOLDERS = ("slides", "cells", "geojson")
"""Folders of curation in its output."""


def shard_name(slide_id: str) -> str:
    """A slide's file of cells."""
    return f"cells/{file_stem(slide_id)}.parquet"


def geojson_name(slide_id: str) -> str:
    """A slide's nuclei for QuPath."""
    return f"geojson/{file_stem(slide_id)}.geojson.gz"
