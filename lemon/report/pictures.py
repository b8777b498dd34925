"""What curation found, to look at: the slide with its nuclei outlined, and a sheet of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from lemon.cells.shard import images_from_arrow
from lemon.schema import CELL_MPP, CELL_PX
from lemon.slides.reader import SlideReader

_OUTLINE = (20, 160, 60)  # green: the complement of H&E's colours
_INSET = (220, 120, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_curation(
    path: Path, *, slide: SlideReader, polygons: Sequence[shapely.Polygon], cells: pa.Table, height_px: int = 900
) -> None:
    """A PNG of three panels: the slide with all outlines, a part of it enlarged, and cells of lowest rank.

    Args:
        path: of the PNG.
        slide: an open slide.
        polygons: of all nuclei, level-0 px.
        cells: rows of the cells table.
        height_px: of the picture.
    """
    overview = _whole_slide(slide, polygons, height_px=height_px)
    # Nuclei of ordinary size: folds and keratin are full of slivers and blots.
    typical = [polygon for polygon in polygons if 20 <= polygon.area * slide.mpp**2 <= 80]
    box = _densest_box(typical, side_px=360 * slide.scale, bounds_px=slide.bounds_px)
    part = _enlarged(slide, polygons, box=box, side_px=height_px)
    factor = overview.shape[1] / slide.bounds_px[2]
    corner = (np.array(box) - slide.bounds_px[:2]) * factor
    side = 360 * slide.scale * factor
    cv2.rectangle(overview, _point(corner), _point(corner + side), _INSET, 2, cv2.LINE_AA)
    sheet = cell_sheet(cells, columns=8, rows=height_px // 75)[:height_px]
    sheet = cv2.copyMakeBorder(sheet, 0, height_px - len(sheet), 0, 0, cv2.BORDER_CONSTANT, value=(255,) * 3)
    gap = np.full((height_px, 12, 3), 255, np.uint8)
    picture = np.hstack([overview, gap, part, gap, sheet])
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture[..., ::-1])


def cell_sheet(cells: pa.Table, *, columns: int, rows: int, pitch_px: int = 75) -> np.ndarray:
    """Crops of lowest rank on a white sheet, uint8 [rows * pitch, columns * pitch, 3]."""
    chosen = cells.take(pc.sort_indices(cells["rank"])[: columns * rows])
    images = images_from_arrow(chosen["image"])
    sheet = np.full((rows * pitch_px, columns * pitch_px, 3), 255, np.uint8)
    margin = (pitch_px - CELL_PX) // 2
    for index, image in enumerate(images):
        y, x = (value * pitch_px + margin for value in divmod(index, columns))
        sheet[y : y + CELL_PX, x : x + CELL_PX] = image
    return sheet


def _whole_slide(slide: SlideReader, polygons: Sequence[shapely.Polygon], *, height_px: int) -> np.ndarray:
    mpp = slide.bounds_px[3] * slide.mpp / height_px
    picture, _ = slide.overview(mpp=mpp)
    picture = cv2.resize(picture, (round(picture.shape[1] * height_px / len(picture)), height_px))
    factor = height_px / slide.bounds_px[3]
    outlines = [(shapely.get_coordinates(polygon) - slide.bounds_px[:2]) * factor for polygon in polygons]
    return _outlined(picture, outlines, thickness=1)


def _enlarged(
    slide: SlideReader, polygons: Sequence[shapely.Polygon], *, box: tuple[float, float], side_px: int
) -> np.ndarray:
    base_px = 360
    x, y = (round(value / slide.scale) for value in box)
    picture = slide.region(x, y, width_px=base_px, height_px=base_px)
    factor = side_px / base_px
    picture = cv2.resize(picture, (side_px, side_px), interpolation=cv2.INTER_CUBIC)
    outlines = [(shapely.get_coordinates(polygon) / slide.scale - (x, y)) * factor for polygon in polygons]
    inside = [ring for ring in outlines if ring.max() > 0 and ring.min() < side_px]
    picture = _outlined(picture, inside, thickness=2)
    return _with_scale_bar(picture, um_per_px=CELL_MPP / factor)


def _outlined(picture: np.ndarray, outlines: Sequence[np.ndarray], *, thickness: int) -> np.ndarray:
    picture = np.ascontiguousarray(picture)
    fixed = [np.round(ring * 16).astype(np.int32) for ring in outlines]
    return cv2.polylines(picture, fixed, True, _OUTLINE, thickness, cv2.LINE_AA, shift=4)


def _with_scale_bar(picture: np.ndarray, *, um_per_px: float, length_um: int = 20) -> np.ndarray:
    high = len(picture)
    length_px = round(length_um / um_per_px)
    cv2.rectangle(picture, (20, high - 34), (20 + length_px, high - 26), (0, 0, 0), -1)
    cv2.putText(picture, f"{length_um} um", (20, high - 44), _FONT, 0.7, (0, 0, 0), 2, cv2.LINE_AA)
    return picture


def _densest_box(
    polygons: Sequence[shapely.Polygon], *, side_px: float, bounds_px: tuple[int, int, int, int]
) -> tuple[float, float]:
    """Corner (level-0 px) of the square that holds most nuclei, on a grid of half its side."""
    if not len(polygons):
        return float(bounds_px[0]), float(bounds_px[1])
    centers = np.array([polygon.centroid.coords[0] for polygon in polygons])
    step = side_px / 2
    cells, counts = np.unique((centers // step).astype(int), axis=0, return_counts=True)
    held = {tuple(cell): int(count) for cell, count in zip(cells.tolist(), counts, strict=True)}
    best = max(held, key=lambda cell: sum(held.get((cell[0] + i, cell[1] + j), 0) for i in (0, 1) for j in (0, 1)))
    return best[0] * step, best[1] * step


def _point(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])
