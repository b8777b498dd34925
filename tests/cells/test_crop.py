from __future__ import annotations

import cv2
import numpy as np
import pytest
import shapely

from lemon.cells.crop import SEAM_PX, Frame, claim_cells, cut_crops, measure, to_level0
from lemon.cells.select import rank_of
from lemon.nuclei.instances import Nucleus
from lemon.slides.cohort import Slide
from lemon.slides.quality import focus_of_crops
from lemon.slides.synthetic import make_tissue
from lemon.slides.tiles import Region, plan_regions

REGION = Region(index=0, x_px=1000, y_px=2000, size_px=512, margin_px=64)


def frame(scale: float = 1.0, bounds: tuple[int, int, int, int] = (0, 0, 5000, 5000)) -> Frame:
    return Frame(slide=Slide("s1", "s1.svs", organ="colon"), mpp=0.25 / scale, scale=scale, bounds_px=bounds)


def ellipse(x: float, y: float, *, a: float = 16, b: float = 12, degrees: float = 30) -> Nucleus:
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    angle = np.deg2rad(degrees)
    points = np.stack([a * np.cos(turn), b * np.sin(turn)], 1) @ [
        [np.cos(angle), np.sin(angle)],
        [-np.sin(angle), np.cos(angle)],
    ]
    return Nucleus((points + (x, y)).astype(np.float32), (x, y))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (512, 512, 3), dtype=np.uint8)


def test_a_crop_is_centred_on_the_centroid() -> None:
    image = np.full((512, 512, 3), 255, np.uint8)
    image[100, 200] = 0
    claims = claim_cells(image, [ellipse(200, 100)], region=REGION, frame=frame())
    assert claims.images.shape == (1, 60, 60, 3)
    dark = np.argwhere(claims.images[0, :, :, 0] == 0)[0]
    assert np.abs(dark - 29.5).max() <= 0.5


def test_crops_over_the_border_of_an_image_are_filled_with_white() -> None:
    image = picture()
    crops = cut_crops(image, np.array([[-20, -10], [480, 500], [3, 4]]))
    assert (crops[0][:10] == 255).all()
    assert (crops[0][:, :20] == 255).all()
    assert (crops[0][10:, 20:] == image[:50, :40]).all()
    assert (crops[1][:12, :32] == image[500:, 480:]).all()
    assert (crops[1][12:] == 255).all()
    assert (crops[2] == image[4:64, 3:63]).all()


def test_a_cell_at_the_edge_of_the_slide_is_kept_and_marked() -> None:
    claims = claim_cells(
        picture(), [ellipse(100, 100), ellipse(200, 200)], region=REGION, frame=frame(bounds=(1080, 0, 5000, 5000))
    )
    by_id = dict(zip(claims.rows["cell_id"].to_pylist(), claims.at_edge.tolist(), strict=True))
    assert by_id == {"s1_1100_2100": True, "s1_1200_2200": False}


def test_rows_hold_position_and_polygon_in_level0_pixels() -> None:
    claims = claim_cells(picture(), [ellipse(200, 100)], region=REGION, frame=frame(scale=0.5))
    (row,) = claims.rows.to_pylist()
    assert (row["cell_id"], row["slide_id"], row["organ"], row["patient_id"]) == ("s1_1200_2100", "s1", "colon", None)
    assert (row["x_level0_px"], row["y_level0_px"]) == ((1200 + 0.5) / 2, (2100 + 0.5) / 2)
    assert row["mpp"] == 0.5
    polygon = shapely.from_wkb(row["polygon"])
    assert polygon.is_valid
    assert polygon.centroid.distance(shapely.Point(row["x_level0_px"], row["y_level0_px"])) < 0.1
    assert row["rank"] == rank_of(["s1_1200_2100"])[0]


def test_measurements_agree_with_geometry() -> None:
    image = np.full((512, 512, 3), 255, np.uint8)
    nuclei = [ellipse(100, 100, a=20, b=20), ellipse(250, 250, a=24, b=12), ellipse(400, 100, a=15, b=9)]
    cv2.ellipse(image, (250, 250), (24, 12), 30, 0, 360, (100, 60, 130), -1)
    values = measure(image, nuclei)
    areas = np.pi * np.array([400, 288, 135]) * 0.0625
    assert values["area_um2"] == pytest.approx(areas, rel=0.1)  # a polygon owns the pixels under its outline
    assert values["eccentricity"] == pytest.approx([0, np.sqrt(1 - 0.25), np.sqrt(1 - 0.36)], abs=0.05)
    assert values["solidity"] == pytest.approx([1, 1, 1], abs=0.02)
    assert values["hematoxylin_od_mean"][1] > 0.3
    assert values["hematoxylin_od_mean"][0] == pytest.approx(0, abs=1e-3)


def test_a_concave_nucleus_has_a_lower_solidity() -> None:
    square = np.array([[0, 0], [40, 0], [40, 40], [20, 10], [0, 40]], np.float32) + 100
    assert measure(picture(), [Nucleus(square, (120.0, 115.0))])["solidity"][0] < 0.7


def test_only_nuclei_of_the_inner_part_and_its_seam_are_claimed() -> None:
    low, high = 64, 512 - 64
    xs = [low - SEAM_PX - 1, low - SEAM_PX, low + SEAM_PX, 200, high - SEAM_PX - 1, high, high + SEAM_PX]
    claims = claim_cells(picture(), [ellipse(x, 200) for x in xs], region=REGION, frame=frame())
    claimed = dict(zip((claims.centroid_px[:, 0] - REGION.x_px).tolist(), claims.contested.tolist(), strict=True))
    assert claimed == {
        low - SEAM_PX: True, low + SEAM_PX: False, 200: False, high - SEAM_PX - 1: False, high: True
    }  # fmt: skip


def test_two_polygons_with_one_centroid_are_one_cell() -> None:
    claims = claim_cells(picture(), [ellipse(200, 200), ellipse(200, 200, a=8, b=8)], region=REGION, frame=frame())
    assert len(claims.rows) == 1


def test_only_cells_below_the_rank_get_a_crop() -> None:
    nuclei = [ellipse(x, y) for x in range(80, 430, 50) for y in range(80, 430, 50)]
    claims = claim_cells(picture(), nuclei, region=REGION, frame=frame(), rank_below=0.3)
    assert len(claims.rows) == len(nuclei)
    assert claims.rows["rank"].to_numpy()[claims.kept].max() < 0.3
    assert 0 < len(claims.images) == len(claims.kept) < len(nuclei)


def test_a_sharp_image_has_a_higher_focus_than_a_blurred_one_and_one_over_the_edge_has_none() -> None:
    tissue = make_tissue(512, seed=0).image
    nuclei = [ellipse(x, y) for x in (100, 200, 300) for y in (100, 200, 300)]
    sharp, blurred = (
        claim_cells(image, nuclei, region=REGION, frame=frame()).focus
        for image in (tissue, cv2.GaussianBlur(tissue, (0, 0), 3))
    )
    assert (sharp > blurred + 0.5).all()
    assert np.allclose(sharp[0], focus_of_crops(cut_crops(tissue, np.array([[70, 70]])))[0], atol=0.1)
    cut = claim_cells(tissue, nuclei, region=REGION, frame=frame(bounds=(1080, 0, 5000, 5000)))
    assert np.array_equal(np.isnan(cut.focus), cut.at_edge[cut.kept])
    assert cut.at_edge.any()


def test_a_region_without_nuclei_claims_nothing() -> None:
    claims = claim_cells(picture(), [], region=REGION, frame=frame())
    assert len(claims.rows) == 0
    assert claims.images.shape == (0, 60, 60, 3)


def test_a_position_is_the_same_whatever_region_sees_it() -> None:
    regions = plan_regions((0, 0, 2000, 900), size_px=1024, overlap_px=128)
    ids = set()
    for region in regions:
        nucleus = ellipse(897.0 - region.x_px, 300.0 - region.y_px)
        image = np.full((1024, 1024, 3), 255, np.uint8)
        ids |= set(claim_cells(image, [nucleus], region=region, frame=frame()).rows["cell_id"].to_pylist())
    assert ids == {"s1_897_300"}


def test_level0_positions_of_pixel_centres_are_half_a_pixel_in() -> None:
    assert to_level0(np.array([0.0, 9.0]), 2.0).tolist() == [1.0, 19.0]
