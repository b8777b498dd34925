"""The tissue beside the map: a picture of each slide, and the outlines of its cells."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
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


def outlines_of(polygons: np.ndarray, centres: np.ndarray, mpp: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outlines for the page: points of each cell uint8 [N], and all points' distance from its centre int8 [M, 2].

    Args:
        polygons: WKB in level-0 px [N]; empty where a cell has none.
        centres: x, y in level-0 px [N, 2].
        mpp: of level 0, um/px [N].

    Distances are in OUTLINE_UM, cut at 127 (32 um); corners that move an edge by less than that are left out.
    """
    shapes = shapely.from_wkb([polygon or None for polygon in polygons])
    rings = shapely.get_exterior_ring(shapely.simplify(shapes, OUTLINE_UM / mpp))
    points, owners = shapely.get_coordinates(rings, return_index=True)
    counts = np.bincount(owners, minlength=len(polygons))
    if (counts > 255).any():  # no nucleus
        points, owners = points[(counts <= 255)[owners]], owners[(counts <= 255)[owners]]
        counts[counts > 255] = 0
    offsets = (points - centres[owners]) * (mpp[owners, None] / OUTLINE_UM)
    return counts.astype(np.uint8), np.round(offsets).clip(-127, 127).astype(np.int8)


def _picture(row: SlideRow, *, side_px: int) -> Picture:
    if not row.path:
        raise SlideError("the table does not say where the slide's file is")
    with local_slide(row.path) as path, SlideReader(path, mpp=row.mpp) as reader:
        if row.width_px is not None and (reader.width_px, reader.height_px) != (row.width_px, row.height_px):
            raise SlideError(f"is not the slide that was curated: {reader.width_px} x {reader.height_px} px")
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
