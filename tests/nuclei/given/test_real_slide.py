"""On a real slide: nuclei in other coordinates are refused, and the line says which setting makes them fit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import numpy as np
import pytest
import shapely

from lemon.nuclei.given.config import CellsFrom
from lemon.nuclei.given.nuclei import GivenError, GivenNuclei, from_polygons
from lemon.nuclei.given.place import place_nuclei
from lemon.nuclei.hematoxylin import Hematoxylin
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import plan_regions, spread
from tests.conftest import shared

pytestmark = pytest.mark.slow

WIDTH, HEIGHT, MPP = 2220, 2967, 0.499


@pytest.fixture(scope="module")
def slide() -> Iterator[SlideReader]:
    with contextlib.closing(SlideReader(shared("data/slides/CMU-1-Small-Region.svs"))) as reader:
        yield reader


@pytest.fixture(scope="module")
def outlines(slide: SlideReader) -> list[np.ndarray]:
    """Of the nuclei that the default segmenter finds: float64 [n, 2] each, level-0 px."""
    regions = plan_regions(slide.bounds_base_px, size_px=1024, overlap_px=128)
    images = [slide.region(each.x_px, each.y_px, width_px=1024, height_px=1024) for each in regions]
    segmenter = Hematoxylin()
    calibration = segmenter.calibrate([images[each.index] for each in spread(regions, 8)])
    found = []
    for region, image in zip(regions, images, strict=True):
        x0, y0, x1, y1 = region.inner_px
        for nucleus in segmenter.postprocess(image, None, calibration):
            x, y = nucleus.centroid_px[0] + region.x_px, nucleus.centroid_px[1] + region.y_px
            if x0 <= x < x1 and y0 <= y < y1:
                found.append((nucleus.contour_px + (region.x_px + 0.5, region.y_px + 0.5)) * slide.scale)
    assert len(found) > 2000
    return found


def nuclei(outlines: list[np.ndarray]) -> GivenNuclei:
    return from_polygons(np.array([shapely.Polygon(each) for each in outlines], object))


def refusal(outlines: list[np.ndarray], slide: SlideReader) -> str:
    """The line by which nuclei are refused."""
    with pytest.raises(GivenError) as refused:
        place_nuclei(nuclei(outlines), slide, CellsFrom(path="file"))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_they_fit_as_they_are(outlines: list[np.ndarray], slide: SlideReader) -> None:
    assert len(place_nuclei(nuclei(outlines), slide, CellsFrom(path="file")).ids) > 0.99 * len(outlines)


@pytest.mark.parametrize(
    ("scale", "offset", "swap", "setting"),
    [
        ((1, 1), (0, 0), True, "cells_from.flip=transpose"),
        ((-1, 1), (WIDTH, 0), False, "cells_from.flip=x"),
        ((1, -1), (0, HEIGHT), False, "cells_from.flip=y"),
        ((-1, -1), (WIDTH, HEIGHT), False, "cells_from.flip=xy"),
        ((MPP, MPP), (0, 0), False, "cells_from.unit=um"),
        ((MPP / 0.25, MPP / 0.25), (0, 0), False, "cells_from.mpp=0.25"),
        ((MPP / 0.2125, MPP / 0.2125), (0, 0), False, "cells_from.mpp=0.2125"),
    ],
)
def test_coordinates_that_are_turned_or_scaled_are_refused_and_the_setting_is_named(
    outlines: list[np.ndarray],
    slide: SlideReader,
    scale: tuple[float, float],
    offset: tuple[float, float],
    swap: bool,
    setting: str,
) -> None:
    moved = [each * scale + offset for each in outlines]
    line = refusal([each[:, ::-1] for each in moved] if swap else moved, slide)
    assert f"they fit with {setting}, which is not assumed: give it if it is so" in line


@pytest.mark.parametrize("offset", [(-300, -450), (25, -12), (4000, 9000)])
def test_an_offset_is_refused_and_told_to_two_pixels(
    outlines: list[np.ndarray], slide: SlideReader, offset: tuple[int, int]
) -> None:
    line = refusal([each + offset for each in outlines], slide)
    told = re.search(r"they fit with cells_from\.offset_px=\[(-?\d+),(-?\d+)\], which is not assumed", line)
    assert told is not None, line
    assert np.abs(np.array(told.groups(), float) + offset).max() <= 2
