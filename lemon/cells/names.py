"""Names of files in the output of curation."""

from __future__ import annotations

import hashlib
import re
import urllib.parse

SETTINGS = "curate.json"

FOLDERS = ("slides", "cells", "geojson")
"""Folders of curation in its output."""

MAX_STEM_BYTES = 180
"""Longest stem of a file: with its suffix, and the mark of a file being written, it stays below 255 bytes."""

# What a file system, a listing or a shell takes amiss in a whole name, though each of its characters is harmless:
# hidden files, a mark of ours (``Store`` passes over it), ends that Windows drops, and its devices.
_ODD = re.compile(r"\.|.*\.tmp-|.*[. ]\Z|(con|prn|aux|nul|com\d|lpt\d)(\.|\Z)", re.IGNORECASE | re.DOTALL)


def file_stem(slide_id: str) -> str:
    """A slide id as a file name: ASCII, at most 180 bytes, another one for each id, no folder, not hidden.

    What a file system or a URL would take amiss is percent-encoded. Where the outcome is too long or odd as a whole,
    it is the id's harmless characters, ``!``, and a hash of the id; ``!`` is in no other name.
    """
    # Ids need not be valid Unicode: bytes of a file name that are no UTF-8 reach Python as lone surrogates.
    content = slide_id.encode("utf-8", "surrogatepass")
    quoted = urllib.parse.quote(content, safe=" ()[],;@+=")
    if quoted and len(quoted) <= MAX_STEM_BYTES and not _ODD.match(quoted):
        return quoted
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", slide_id)[:60].strip("_")
    return f"{readable or 'slide'}!{hashlib.sha256(content).hexdigest()[:32]}"


def shard_name(slide_id: str) -> str:
    """A slide's file of cells."""
    return f"cells/{file_stem(slide_id)}.parquet"


def ledger_name(slide_id: str) -> str:
    """A slide's row of the slides table."""
    return f"slides/{file_stem(slide_id)}.parquet"


def geojson_name(slide_id: str) -> str:
    """A slide's nuclei for QuPath."""
    return f"geojson/{file_stem(slide_id)}.geojson.gz"
