"""The tissue beside the map: a picture of each slide, and the outlines of its cells."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from PIL import Image
from tqdm import tqdm

from lemon.schema import SlideRow
from lemon.slides.errors import RegionError, SlideError
from lemon.slides.local import local_slide
from lemon.slides.reader import SlideReader

logger = logging.getLogger(__name__)

MOST_PX = 100_000_000
"""Of all pictures together, so that a page of many slides can still be opened."""

JPEG_QUALITY = 70

OUTLINE_UM = 0.25
"""Step in which outlines are stored: a nucleus is some 6 um wide."""

OUTLINES_AT_ONCE = 50_000  # cells whose polygons are unpacked

TILE_PX = 512
"""Side of a tile of a slide that is served."""

_SLIDES_OPEN = 4

_BLANK_PX = 256  # of the longer side, where a slide cannot be read


@dataclass(frozen=True)
class Picture:
    """A slide as a JPEG; its px are ``scale`` times level-0 px counted from ``x``, ``y``."""

    slide_id: str
    jpeg: bytes
    x: float
    y: float
    scale: float
    width: int
    height: int
    mpp: float
    """Of level 0."""
    fault: str | None = None
    """Why the tissue is not shown."""


def pictures_of(rows: Sequence[SlideRow], *, side_px: int) -> Iterator[Picture]:
    """A picture of each slide, at most ``side_px`` a side and MOST_PX in all; white where it cannot be read.

    The slides that cannot be are named in one warning, with the reason of the first.
    """
    side_px = min(side_px, math.isqrt(MOST_PX // len(rows)))
    faults = []
    for row in tqdm(rows, unit="slide", desc="tissue", disable=None):
        try:
            picture = _picture(row, side_px=side_px)
        except (SlideError, RegionError) as error:
            faults.append(f"{row.path or row.slide_id}: {error}")
            picture = _blank(row, fault=" ".join(str(error).split()))
        yield picture
    if faults:
        logger.warning("tissue of %d of %d slides is not shown; %s", len(faults), len(rows), faults[0])


def outlines_of(polygons: pa.ChunkedArray, centres: np.ndarray, mpp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outlines for the page: points of each cell uint8 [N], and all points' distance from its centre int8 [M, 2].

    Args:
        polygons: WKB in level-0 px [N]; empty where a cell has none.
        centres: x, y in level-0 px [N, 2].
        mpp: of level 0, um/px [N].

    Distances are in OUTLINE_UM, cut at 127 (32 um); corners that move an edge by less than that are left out.
    """
    parts = [
        _outlines(
            polygons[start : start + OUTLINES_AT_ONCE],
            *(each[start : start + OUTLINES_AT_ONCE] for each in (centres, mpp)),
        )
        for start in range(0, len(polygons), OUTLINES_AT_ONCE)
    ]
    counts, offsets = zip(*parts, strict=True)
    return np.concatenate(counts), np.concatenate(offsets)


def _outlines(polygons: pa.ChunkedArray, centres: np.ndarray, mpp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shapes = shapely.from_wkb([polygon or None for polygon in polygons.to_pylist()])
    rings = shapely.get_exterior_ring(shapely.simplify(shapes, OUTLINE_UM / mpp))
    points, owners = shapely.get_coordinates(rings, return_index=True)
    counts = np.bincount(owners, minlength=len(polygons))
    if (counts > 255).any():  # no nucleus
        points, owners = points[(counts <= 255)[owners]], owners[(counts <= 255)[owners]]
        counts[counts > 255] = 0
    offsets = (points - centres[owners]) * (mpp[owners, None] / OUTLINE_UM)
    return counts.astype(np.uint8), np.round(offsets).clip(-127, 127).astype(np.int8)


class Tissue:
    """Tiles of slides for OpenSeadragon, read as they are asked for; a few slides are open, one tile is read at a time.

    Level ``ceil(log2(longer side))`` is the slide as it was scanned, each one below half of it.
    """

    def __init__(self, rows: Sequence[SlideRow]) -> None:
        self._rows, self._lock = rows, threading.Lock()
        self._open: OrderedDict[int, tuple[contextlib.ExitStack, SlideReader]] = OrderedDict()

    def close(self) -> None:
        """Close the slides."""
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()

    def described(self, number: int) -> dict[str, Any]:
        """Facts of a slide as those of a Picture, of its level-0 px; with a white picture where it cannot be read."""
        row = self._rows[number]
        with self._lock:
            try:
                reader = self._reader(number)
            except SlideError as error:
                blank = _blank(row, fault=" ".join(str(error).split()))
                return asdict(blank) | {"jpeg": base64.b64encode(blank.jpeg).decode()}
            left, top, width, height = reader.bounds_px
            return asdict(Picture(row.slide_id, b"", left, top, 1, width, height, reader.mpp)) | {"jpeg": None}

    def tile(self, number: int, level: int, column: int, row: int) -> bytes | None:
        """A tile as a JPEG of at most TILE_PX a side; None where there is none, or it cannot be read."""
        if number >= len(self._rows):
            return None
        with self._lock, contextlib.suppress(SlideError, RegionError):
            reader = self._reader(number)
            left, top, width, height = reader.bounds_px
            most = math.ceil(math.log2(max(width, height)))
            side = TILE_PX << max(most - level, 0)
            x, y = column * side, row * side
            if level <= most and x < width and y < height:
                size = min(side, width - x), min(side, height - y)
                return _jpeg(reader.shrunk(left + x, top + y, *size, downsample=side / TILE_PX))
        return None

    def _reader(self, number: int) -> SlideReader:
        """A slide, opened where it is not; the one that was not looked at for longest is closed for it."""
        if number not in self._open:
            if len(self._open) == _SLIDES_OPEN:
                self._open.popitem(last=False)[1][0].close()
            stack = contextlib.ExitStack()
            self._open[number] = stack, stack.enter_context(_opened(self._rows[number]))
        self._open.move_to_end(number)
        return self._open[number][1]


@contextlib.contextmanager
def _opened(row: SlideRow) -> Iterator[SlideReader]:
    """A slide of the table. Raises SlideError where it cannot be opened or is another than was curated."""
    if not row.path:
        raise SlideError("the table does not say where the slide's file is")
    with local_slide(row.path) as path, SlideReader(path, mpp=row.mpp) as reader:
        if row.width_px is not None and (reader.width_px, reader.height_px) != (row.width_px, row.height_px):
            raise SlideError(f"is not the slide that was curated: {reader.width_px} x {reader.height_px} px")
        yield reader


def _picture(row: SlideRow, *, side_px: int) -> Picture:
    with _opened(row) as reader:
        image, _ = reader.overview(mpp=reader.mpp, max_px=side_px)
        left, top, width, _ = reader.bounds_px
        mpp = reader.mpp
    height_px, width_px = image.shape[:2]
    return Picture(row.slide_id, _jpeg(image), left, top, width_px / width, width_px, height_px, mpp)


def _blank(row: SlideRow, *, fault: str) -> Picture:
    width, height = row.width_px or 1, row.height_px or 1
    scale = _BLANK_PX / max(width, height)
    image = np.full((max(round(height * scale), 1), max(round(width * scale), 1), 3), 255, np.uint8)
    return Picture(row.slide_id, _jpeg(image), 0, 0, scale, image.shape[1], image.shape[0], row.mpp or 1, fault)


def _jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True, progressive=True)
    return stream.getvalue()
