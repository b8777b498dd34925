"""Nuclei that fit are placed with all that is known of them; others are refused, with a guess that is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lemon.nuclei.given.config import CellsFrom
from lemon.nuclei.given.nuclei import GivenError, GivenNuclei, gathered
from lemon.nuclei.given.place import PlacedNuclei, place_nuclei
from lemon.nuclei.given.segmenter import GivenSegmenter
from lemon.slides.reader import SlideReader
from lemon.slides.tiles import plan_regions
from tests.nuclei.given.made_up import CENTRES, CLASSES, COUNT, OUTLINES, SIDE

NUCLEI = gathered(OUTLINES.reshape(-1, 2), [OUTLINES.shape[1]] * COUNT, classes=CLASSES)


def placed(nuclei: GivenNuclei, reader: SlideReader, **settings: Any) -> PlacedNuclei:
    return place_nuclei(nuclei, reader, CellsFrom(path="file", **settings))


def moved(points: np.ndarray) -> GivenNuclei:
    return replace(NUCLEI, points=points.reshape(-1, 2))


def test_nuclei_that_fit_are_in_base_pixels_without_a_word(reader: SlideReader) -> None:
    found = placed(NUCLEI, reader)
    assert np.abs(found.centroid - (CENTRES - 0.5)).max() <= 0.5
    assert np.allclose(found.points.reshape(OUTLINES.shape).mean(axis=1), CENTRES - 0.5, atol=0.5)
    assert (found.ids.to_pylist(), found.classes.to_pylist()) == ([str(i) for i in range(COUNT)], CLASSES)
    assert found.notes == ()


@pytest.mark.parametrize(
    ("points", "settings"),
    [
        (OUTLINES / 4, {"unit": "um"}),
        (OUTLINES / 2, {"level": 1}),
        (OUTLINES / 2, {"mpp": 0.5}),
        (OUTLINES * [1, -1] + [0, SIDE], {"flip": "y"}),
        (SIDE - OUTLINES, {"flip": "xy"}),
        (OUTLINES[..., ::-1], {"flip": "transpose"}),
        (OUTLINES - [300, 40], {"offset_px": [300, 40]}),
    ],
)
def test_other_coordinates_fit_when_the_user_says_what_they_are(
    reader: SlideReader, points: np.ndarray, settings: dict[str, Any]
) -> None:
    found = placed(moved(points), reader, **settings)
    assert np.abs(found.centroid - (CENTRES - 0.5)).max() <= 0.5


@pytest.mark.parametrize(
    ("points", "guess"),
    [
        (OUTLINES / 4, "cells_from.level=2"),
        (OUTLINES / 2, "cells_from.level=1"),
        (OUTLINES * 4, "nothing fits"),
        (OUTLINES * [1, -1] + [0, SIDE], "cells_from.flip=y"),
        (SIDE / 2 - OUTLINES / 2, "cells_from.level=1 cells_from.flip=xy"),
    ],
)
def test_coordinates_that_do_not_fit_are_refused_with_the_setting_that_would(
    reader: SlideReader, points: np.ndarray, guess: str
) -> None:
    with pytest.raises(GivenError) as refused:
        placed(moved(points), reader)
    assert guess in str(refused.value)
    assert "read as px of level 0" in str(refused.value)


def test_an_offset_is_guessed_to_the_pixel(reader: SlideReader) -> None:
    with pytest.raises(GivenError, match=r"beyond the slide of 800 x 800 px.*cells_from.offset_px=\[") as refused:
        placed(moved(OUTLINES + [5000, -321]), reader)
    guess = str(refused.value).partition("offset_px=[")[2].partition("]")[0]
    assert np.abs(np.array(guess.split(","), float) - [-5000, 321]).max() <= 3


def test_nuclei_on_no_nuclei_are_told_where_nothing_else_fits(reader: SlideReader) -> None:
    points = np.random.default_rng(0).uniform(80, 720, (COUNT, 1, 2)) + OUTLINES - CENTRES[:, None]
    assert placed(moved(points), reader).notes == (
        "nuclei are no darker than what is beside them: do they belong to this slide?",
    )


def test_centroids_stand_in_circles_of_the_radius_that_is_told(reader: SlideReader) -> None:
    found = placed(gathered(CENTRES, [1] * COUNT), reader, radius_um=5)
    assert found.notes == ("centroids alone: circles of 5 um stand for outlines",)
    outline = found.points[found.starts[0] : found.starts[1]]
    x, y = outline.T
    assert np.isclose(0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))), np.pi * 20**2)  # px2


def test_outlines_that_are_none_are_left_out_and_counted(reader: SlideReader) -> None:
    bad = [
        np.array([[10, 10], [20, 10]]),  # a line
        np.array([[10, 10], [20, 10], [30, 10]]),  # no area
        np.array([[10, 10], [20, 20], [10, 10]]),  # a closed line
        np.array([[np.nan, 1], [2, 3], [4, 5]]),
        np.empty((0, 2)),
    ]
    bow = np.array([[100, 100], [140, 140], [140, 100], [110, 130.0]])  # crosses itself: its larger part stays
    twin = OUTLINES[5] + 0.01
    points = np.concatenate([*bad, bow, twin, [*OUTLINES.reshape(-1, 2)], OUTLINES[0] - CENTRES[0] - 100])
    sizes = [*map(len, bad), 4, 12, *[12] * COUNT, 12]
    found = placed(gathered(points, sizes), reader)
    assert found.notes == (
        "5 without an outline that encloses an area are left out",
        "1 beyond the slide are left out",
        "1 have their centroid in the pixel of another and are left out",
    )
    assert len(found.ids) == COUNT + 1
    assert found.ids[0].as_py() == "5"  # the place in the file


def test_a_matrix_of_xenium_explorer_leads_from_its_image_to_the_slide(tmp_path: Path, reader: SlideReader) -> None:
    turned = np.array([[0, -1.2, 900], [1.2, 0, 50], [0, 0, 1]])  # px of the slide to px of Xenium's image
    (tmp_path / "matrix.csv").write_text("\n".join(",".join(map(str, row)) for row in turned))
    xenium_um = (OUTLINES @ turned[:2, :2].T + turned[:2, 2]) * 0.2125
    nuclei = replace(moved(xenium_um), unit="um", scale=4.0)
    found = placed(nuclei, reader, alignment=str(tmp_path / "matrix.csv"))
    assert np.abs(found.centroid - (CENTRES - 0.5)).max() <= 0.5
    assert found.notes == ("nuclei read as um, aligned",)


def test_each_nucleus_is_of_one_region(reader: SlideReader) -> None:
    found = placed(NUCLEI, reader)
    regions = plan_regions(reader.bounds_base_px, size_px=320, overlap_px=128)
    segmenter = GivenSegmenter(found, regions)
    seen: list[str | None] = []
    for region in (each for each in regions if each.index in found.in_regions(regions)):
        nuclei = segmenter.postprocess_of(region)(np.empty(0), None, None)
        x0, y0, x1, y1 = region.inner_px
        for nucleus in nuclei:
            x, y = nucleus.centroid_px[0] + region.x_px, nucleus.centroid_px[1] + region.y_px
            assert x0 <= x < x1
            assert y0 <= y < y1
            assert np.abs(nucleus.contour_px.mean(axis=0) - nucleus.centroid_px).max() < 1
        seen += [nucleus.foreign_id for nucleus in nuclei]
    assert sorted(seen) == sorted(str(index) for index in range(COUNT))
