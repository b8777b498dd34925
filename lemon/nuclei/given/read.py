"""Which reader a file of nuclei is for, by its name and, where that does not tell, by what it begins with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from lemon.nuclei.given.documents import read_document
from lemon.nuclei.given.images import read_labels
from lemon.nuclei.given.nuclei import GivenError, GivenNuclei
from lemon.nuclei.given.tables import XENIUM_FILES, read_anndata, read_spatialdata, read_table
from lemon.slides.reader import SlideReader

Read = Callable[[Path, SlideReader], GivenNuclei]

_READERS: dict[str, Read] = {
    ".geojson": read_document,
    ".json": read_document,
    ".tif": read_labels,
    ".tiff": read_labels,
    ".npy": read_labels,
    ".npz": read_labels,
    ".mat": read_labels,
    ".parquet": read_table,
    ".pq": read_table,
    ".csv": read_table,
    ".tsv": read_table,
    ".txt": read_table,
    ".h5ad": read_anndata,
}

SUFFIXES = (*_READERS, ".geojson.gz", ".json.gz", ".zarr")
"""Of files that are read; a folder is an output of Xenium or of CellViT, or a store of zarr or SpatialData."""

INSIDE = ("cell_masks.json", "cells.json", "cell_detection/cells.json", *XENIUM_FILES)
"""Files that tell what a folder is: HistoPLUS, CellViT, Xenium."""


def read_given(path: Path, reader: SlideReader) -> GivenNuclei:
    """The nuclei of a file or folder, in its own coordinates.

    Args:
        path: a local file.
        reader: of the slide that they are of, for its size and its levels.

    Raises:
        GivenError: it cannot be read, or there is no nucleus in it; one line that follows the file's name.
    """
    if not path.exists():
        raise GivenError("no such file")
    if path.is_file() and path.stat().st_size == 0:
        raise GivenError("is empty (0 bytes)")
    path = _inside(path)
    nuclei = _reader_of(path)(path, reader)
    if not len(nuclei):
        raise GivenError("holds no nuclei")
    return nuclei


def digest_of(path: Path) -> str:
    """Of the bytes that ``read_given`` reads (SHA-256, 32 digits). Raises OSError."""
    path = _inside(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:32]


def _inside(path: Path) -> Path:
    """The file of nuclei in a folder that a program writes; any other path as it is."""
    return next((path / name for name in INSIDE if path.is_dir() and (path / name).is_file()), path)


def _reader_of(path: Path) -> Read:
    if path.is_dir():
        return read_spatialdata if (path / "shapes").is_dir() else read_labels
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    known = _READERS.get(suffix.lower())
    if known is None:
        raise GivenError(f"has no known suffix; expected one of {', '.join(SUFFIXES)}")
    return known
