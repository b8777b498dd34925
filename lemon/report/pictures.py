"""What curation found, to look at: the slide with its nuclei outlined, a good field and the worst one, and cells."""

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
_GOOD, _BAD = (220, 120, 0), (190, 20, 60)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_FIELD_PX = 360  # at CELL_MPP: 90 um

AREA_UM2 = (20, 80)
SOLIDITY = 0.9
"""Ordinary nuclei are of such sizes and at least so solid; slivers, blots and ragged flakes are not."""


def draw_curation(
    path: Path, *, slide: SlideReader, polygons: Sequence[shapely.Polygon], cells: pa.Table, height_px: int = 720
) -> None:
    """A PNG of four panels: the slide with all outlines, a good field and the worst one enlarged, and cells.

    The good field has most ordinary nuclei, the worst one most outlines that are not. The cells are of lowest rank: a
    fair sample.

    Args:
        path: of the PNG.
        slide: an open slide.
        polygons: of all nuclei, level-0 px.
        cells: rows of the cells table.
        height_px: of the picture.
    """
    is_ordinary = ordinary_outlines(polygons, mpp=slide.mpp)
    side = _FIELD_PX * slide.scale
    overview = _whole_slide(slide, polygons, height_px=height_px)
    factor = overview.shape[1] / slide.bounds_px[2]
    panels = []
    for chosen, color, text in ((is_ordinary, _GOOD, "a good field"), (~is_ordinary, _BAD, "the worst field")):
        box = _densest_box(
            [polygon for polygon, is_one in zip(polygons, chosen, strict=True) if is_one],
            side_px=side,
            bounds_px=slide.bounds_px,
        )
        corner = (np.array(box) - slide.bounds_px[:2]) * factor
        cv2.rectangle(overview, _point(corner), _point(corner + side * factor), color, 2, cv2.LINE_AA)
        panels.append(_titled(_enlarged(slide, polygons, box=box, side_px=height_px), text, color=color))
    sheet = cell_sheet(cells, columns=8, rows=height_px // 75)[:height_px]
    sheet = cv2.copyMakeBorder(sheet, 0, height_px - len(sheet), 0, 0, cv2.BORDER_CONSTANT, value=(255,) * 3)
    gap = np.full((height_px, 12, 3), 255, np.uint8)
    picture = np.hstack([overview, gap, panels[0], gap, panels[1], gap, sheet])
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture[..., ::-1])


def ordinary_outlines(polygons: Sequence[shapely.Polygon], *, mpp: float) -> np.ndarray:
    """Which outlines (level-0 px of ``mpp`` um) are of ordinary size and shape: bool [N]."""
    area = shapely.area(polygons)
    solidity = area / np.maximum(shapely.area(shapely.convex_hull(polygons)), np.finfo(float).tiny)
    return (AREA_UM2[0] <= area * mpp**2) & (area * mpp**2 <= AREA_UM2[1]) & (solidity >= SOLIDITY)


def ordinary_cells(cells: pa.Table, *, count: int) -> np.ndarray:
    """Images of nuclei to show, uint8 [count or fewer, 60, 60, 3], of a cells table.

    Of ordinary size and shape, and of these the darker and sharper half; by rank, so that none is chosen by eye. Where
    there are too few, any cells follow.
    """
    cells = cells.take(pc.sort_indices(cells["rank"]))
    images = images_from_arrow(cells["image"])
    area, solidity, density = (cells[name].to_numpy() for name in ("area_um2", "solidity", "hematoxylin_od_mean"))
    margin = CELL_PX // 4  # the nucleus, not its neighbours
    greys = (cv2.cvtColor(image[margin:-margin, margin:-margin], cv2.COLOR_RGB2GRAY) for image in images)
    sharpness = np.array([cv2.Laplacian(grey, cv2.CV_64F).var() for grey in greys])
    is_chosen = (AREA_UM2[0] <= area) & (area <= AREA_UM2[1]) & (solidity >= SOLIDITY)
    for measure in (density, sharpness):
        if is_chosen.any():
            is_chosen &= measure >= np.median(measure[is_chosen])
    return images[np.argsort(~is_chosen, kind="stable")[:count]]


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
    x, y = (round(value / slide.scale) for value in box)
    picture = slide.region(x, y, width_px=_FIELD_PX, height_px=_FIELD_PX)
    factor = side_px / _FIELD_PX
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


def _titled(picture: np.ndarray, text: str, *, color: tuple[int, int, int]) -> np.ndarray:
    """With a frame in a colour and a title on white."""
    picture = cv2.rectangle(picture, (0, 0), (picture.shape[1] - 1, len(picture) - 1), color, 6)
    (width, _), _ = cv2.getTextSize(text, _FONT, 0.7, 2)
    cv2.rectangle(picture, (6, 6), (width + 22, 40), (255, 255, 255), -1)
    return cv2.putText(picture, text, (14, 30), _FONT, 0.7, color, 2, cv2.LINE_AA)


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
