"""Names of files in the output of curation."""

from __future__ import annotations

import urllib.parse

SETTINGS = "curate.json"

FOLDERS = ("slides", "cells", "geojson")
"""Folders of curation in its output."""


def file_stem(slide_id: str) -> str:
    """A slide id as a file name: what a file system or a URL would take amiss is percent-encoded."""
    return urllib.parse.quote(slide_id, safe=" ()[],;@+=")


def shard_name(slide_id: str) -> str:
    """A slide's file of cells."""
    return f"cells/{file_stem(slide_id)}.parquet"


def ledger_name(slide_id: str) -> str:
    """A slide's row of the slides table."""
    return f"slides/{file_stem(slide_id)}.parquet"


def geojson_name(slide_id: str) -> str:
    """A slide's nuclei for QuPath."""
    return f"geojson/{file_stem(slide_id)}.geojson.gz"
