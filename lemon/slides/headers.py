"""What a file's own header says before OpenSlide decodes a pixel: what it is, and whether it is safe to decode.

Nothing here reads pixels, so a file of any size is checked in milliseconds.
"""

from __future__ import annotations

import itertools
import logging
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from pydicom.errors import BytesLengthException, InvalidDicomError
from pydicom.filereader import read_partial

from lemon.slides.errors import SlideError

MAX_TILE_PX = 8192**2
"""Larger tiles are refused: for one pixel OpenSlide decodes its whole tile. Scanners write 240 to 2048 px a side."""

MAX_TILE_BYTES = 4 * MAX_TILE_PX
"""Decoded bytes of a tile."""

MAX_SIDE_PX = 4 << 20
"""A glass slide is 75 mm long: 1.5 million px at 0.05 um/px."""

MAX_PX_PER_BYTE = 2000
"""Stored scans have 1 to 100 px a byte; the index of an empty slide's tiles alone keeps it below some 5000."""

_BIG_PX = 10**9  # smaller slides are decoded within seconds, whatever is in them
_MAX_PAGES = 1000
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # DICOM's class of whole-slide microscopy images

CONVERT = "convert it with `vips tiffsave IN OUT.tiff --tile --pyramid --compression jpeg --bigtiff`"

# All that the two parsers raise on damaged or hostile bytes.
PARSER_ERRORS = (
    tifffile.TiffFileError,
    InvalidDicomError,
    BytesLengthException,
    OSError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
)

_IMAGES = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"BM", "a BMP image"),
    (b"GIF8", "a GIF image"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
)
_NO_IMAGES = (
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive: unpack it"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"\x00\x05\x16\x07", "a note of macOS about another file (AppleDouble)"),
    (b"version https://git-lfs", "a pointer of Git LFS: fetch the file with `git lfs pull`"),
    (b"<!DOCTYPE html", "a web page: the download failed"),
    (b"<html", "a web page: the download failed"),
)
_SEVERAL = {
    ".mrxs": "a MIRAX slide without its folder of the same name, or an incomplete one: copy both",
    ".vms": "a Hamamatsu slide without all the files that it names: copy them beside it",
    ".vmu": "a Hamamatsu slide without all the files that it names: copy them beside it",
}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Reported by LEMON, in the row of the slide; a handler that does nothing keeps Python from printing them besides.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("pydicom").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Instance:
    """One file of a DICOM slide."""

    series: str
    is_volume: bool  # pixels of the slide itself, and not its label or overview
    width_px: int


def check_tile(width_px: int, height_px: int, *, bytes_per_px: int = 4) -> None:
    """Raise SlideError for a tile that no scanner writes and no memory holds."""
    decoded = width_px * height_px * bytes_per_px
    if width_px * height_px > MAX_TILE_PX or decoded > MAX_TILE_BYTES:
        raise SlideError(
            f"a tile of {width_px} x {height_px} px ({decoded / 1e9:.1f} GB decoded) exceeds the limit of"
            f" {MAX_TILE_PX / 1e6:.0f} million px and {MAX_TILE_BYTES / 1e9:.1f} GB: {CONVERT}"
        )


def check_size(width_px: int, height_px: int) -> None:
    """Raise SlideError for a slide larger than glass."""
    if max(width_px, height_px) > MAX_SIDE_PX:
        raise SlideError(f"{width_px} x {height_px} px is no slide: a side exceeds {MAX_SIDE_PX} px")


def check_tiff(path: str) -> list[str]:
    """What is remarkable in the directory of a TIFF, in words; nothing for any other file, or one that is unreadable.

    Raises SlideError where decoding it would exhaust memory or time, or would make something else of its values.
    """
    if _begins(path)[:4] not in _TIFF_MAGIC:
        return []
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = list(itertools.islice(tiff.pages, _MAX_PAGES + 1))
            return _check_pages([page.aspage() for page in pages], size=Path(path).stat().st_size)
    except PARSER_ERRORS:
        return []  # OpenSlide is asked, and explains_refusal where it refuses


def _check_pages(pages: list[tifffile.TiffPage], *, size: int) -> list[str]:
    if len(pages) > _MAX_PAGES:
        raise SlideError(f"a TIFF of more than {_MAX_PAGES} images is no slide")
    for page in pages:
        if page.is_tiled:
            check_tile(page.tilewidth, page.tilelength, bytes_per_px=max(4, page.samplesperpixel * _bits(page) // 8))
    first = pages[0]
    check_size(first.imagewidth, first.imagelength)
    area_px = first.imagewidth * first.imagelength
    if area_px > _BIG_PX and area_px / size > MAX_PX_PER_BYTE:
        raise SlideError(
            f"{first.imagewidth} x {first.imagelength} px in {size} bytes are {area_px / size:.0f} px a byte, and no "
            f"scan has more than {MAX_PX_PER_BYTE}"
        )
    if _bits(first) != 8:
        raise SlideError(
            f"{_bits(first)} bits a channel; expected 8: scale it to 8 bits, as with `vips cast IN OUT uchar --shift`, "
            f"then {CONVERT}"
        )
    beyond = _beyond(first, size=size)
    kind = "tiles" if first.is_tiled else "strips"
    return [f"truncated: {beyond} of {len(first.dataoffsets)} {kind} lie beyond the file's end"] if beyond else []


def _beyond(page: tifffile.TiffPage, *, size: int) -> int:
    """Tiles or strips of an image that end behind the end of the file."""
    ends = np.array(page.dataoffsets, np.float64) + np.array(page.databytecounts, np.float64)
    return int((ends > size).sum())


def _bits(page: tifffile.TiffPage) -> int:
    return int(np.max(page.bitspersample))


def explain_refusal(path: str) -> str:
    """Why OpenSlide cannot open a file, and how to repair it."""
    if words := _SEVERAL.get(Path(path).suffix.lower()):
        return words
    start = _begins(path)
    for magic, words in _IMAGES:
        if start.startswith(magic):
            return f"{words}: {CONVERT}"
    for magic, words in _NO_IMAGES:
        if start.lstrip().lower().startswith(magic.lower()):
            return words
    return _explain_tiff(path) if start[:4] in _TIFF_MAGIC else "truncated, or another kind of file"


def _explain_tiff(path: str) -> str:
    size = Path(path).stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            pages = [page.aspage() for page in itertools.islice(tiff.pages, _MAX_PAGES)]
            if not pages[0].is_tiled:
                return f"a TIFF in strips, not tiled: {CONVERT}"
            if not any(_beyond(page, size=size) for page in pages):
                compression = getattr(pages[0].compression, "name", str(pages[0].compression))
                return f"a tiled TIFF with compression {compression}: {CONVERT}"
    except PARSER_ERRORS:
        pass  # its directory, or a part of it, is not there
    return f"a truncated TIFF ({size} bytes): copy or download it again"


def read_instance(path: str) -> Instance | None:
    """What a file of a DICOM slide says of itself; None for one that is no such file."""
    try:
        with Path(path).open("rb") as file, warnings.catch_warnings(action="ignore"):
            # Up to the width of the whole slide: the positions of its tiles, which may be many, come later.
            dataset = read_partial(file, stop_when=lambda tag, *_: int(tag) > 0x00480006)
            if str(dataset.get("SOPClassUID", "")) != _WHOLE_SLIDE:
                return None
            kind = dataset.get("ImageType", [])
            # THUMBNAIL is a level of the pyramid, LABEL and OVERVIEW are photographs of the glass.
            return Instance(
                series=str(dataset.get("SeriesInstanceUID", path)),
                is_volume=len(kind) < 3 or kind[2] in ("VOLUME", "THUMBNAIL"),
                width_px=int(dataset.get("TotalPixelMatrixColumns", 0)),
            )
    except PARSER_ERRORS:
        return None


def _begins(path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(64)
    except OSError:
        return b""
