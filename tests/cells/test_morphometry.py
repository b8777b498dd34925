"""Measures of nuclei are those of scikit-image and of geometry, each in its unit."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import shapely
from skimage.feature import graycomatrix, graycoprops

from lemon import schema
from lemon.cells import morphometry
from lemon.cells.morphometry import COMPUTED, NEIGHBOURHOOD, measure_cells, neighbourhood, texture
from lemon.cells.shard import images_to_arrow


def cells(polygons: np.ndarray, images: np.ndarray, centre: np.ndarray, *, mpp: float = 0.25) -> pa.Table:
    count = len(polygons)
    columns = {"cell_id": [str(index) for index in range(count)], "mpp": np.full(count, mpp)}
    columns |= {"x_level0_px": centre[:, 0], "y_level0_px": centre[:, 1]}
    columns |= {name: np.zeros(count, np.float32) for name in schema.MORPHOMETRICS}
    return pa.table(columns | {"polygon": list(shapely.to_wkb(polygons)), "image": images_to_arrow(images)})


def ellipse(long_px: float, short_px: float, centre: tuple[float, float]) -> shapely.Polygon:
    angle = 2 * np.pi * np.arange(400) / 400
    points = np.stack([long_px * np.cos(angle), short_px * np.sin(angle)], axis=1)
    return shapely.Polygon(points @ [[0.8, 0.6], [-0.6, 0.8]] + centre)


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_an_ellipse_has_its_own_axes_in_um_wherever_it_lies(mpp: float) -> None:
    centre = np.array([[100_000.0, 70_000.0]] * 2)
    sides_um = ((10, 5), (7.5, 7.5))
    polygons = np.array([ellipse(long / mpp, short / mpp, (100_000.0, 70_000.0)) for long, short in sides_um])
    images = np.full((2, 60, 60, 3), 200, np.uint8)
    values = measure_cells(cells(polygons, images, centre, mpp=mpp))
    assert values["major_axis_um"] == pytest.approx([20, 15], rel=1e-3)
    assert values["minor_axis_um"] == pytest.approx([10, 15], rel=1e-3)
    assert values["perimeter_um"][1] == pytest.approx(np.pi * 15, rel=1e-3)
    assert values["circularity"][1] == pytest.approx(1, abs=1e-3)
    assert values["circularity"][0] == pytest.approx(0.84, abs=0.01)


def test_stain_is_measured_inside_the_outline_and_against_its_ring() -> None:
    image = np.full((1, 60, 60, 3), 255, np.uint8)
    image[0, 20:40, 20:40] = (70, 60, 150)  # blue: hematoxylin
    centre = np.array([[1030.0, 1030.0]])  # the crop's middle is at pixel 29.5
    square = shapely.box(1020.5, 1020.5, 1039.5, 1039.5)  # through the centres of its outermost pixels
    values = measure_cells(cells(np.array([square]), image, centre))
    assert values["hematoxylin_od_sd"] == pytest.approx(0, abs=1e-3)
    assert values["hematoxylin_od_contrast"][0] > 0.3
    assert values["gradient_od_um"][0] > 0  # at the border alone
    bare = measure_cells(cells(np.array([square]), image[:, ::-1] * 0 + 255, centre))
    assert bare["hematoxylin_od_contrast"] == pytest.approx(0)
    assert bare["glcm_entropy"] == pytest.approx(0)


def test_texture_is_that_of_scikit_image() -> None:
    density = np.random.default_rng(0).gamma(2, 0.25, (3, 60, 60)).astype(np.float32)
    values = texture(density, np.ones(density.shape, bool))
    for index, one in enumerate(density):
        grey = np.clip(one / morphometry.MAX_OD * 16, 0, 15).astype(np.uint8)
        angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
        matrix = graycomatrix(grey, [2], angles, levels=16, symmetric=True).sum(axis=3, keepdims=True)
        for name in ("contrast", "homogeneity", "correlation", "entropy"):
            expected = graycoprops(matrix.astype(float), name)[0, 0]
            unit = np.log(2) if name == "entropy" else 1  # scikit-image counts in nats
            assert values[f"glcm_{name}"][index] == pytest.approx(expected / unit, rel=1e-6), name


def test_texture_looks_at_pixels_of_the_nucleus_alone() -> None:
    density = np.random.default_rng(0).uniform(0, 1, (1, 60, 60)).astype(np.float32)
    inside = np.zeros(density.shape, bool)
    inside[:, 10:30, 10:30] = True
    flat = np.where(inside, 0.7, density)
    values = texture(flat, inside)
    assert [float(values[f"glcm_{name}"][0]) for name in ("contrast", "homogeneity", "entropy")] == [0, 1, 0]
    assert all(np.isnan(column[0]) for column in texture(density, inside & False).values())


def test_neighbours_are_counted_in_um() -> None:
    grid = np.stack(np.meshgrid(np.arange(21.0), np.arange(21.0)), axis=-1).reshape(-1, 2) * 10
    values = neighbourhood(grid)
    middle = len(grid) // 2
    assert values["nearest_um"][middle] == 10
    assert values["nearest_5_um"][middle] == pytest.approx((4 * 10 + np.sqrt(200)) / 5)
    assert values["density_per_mm2"][middle] == pytest.approx(81 / (np.pi * 0.05**2))  # with itself
    few = neighbourhood(grid[:2])
    assert few["nearest_um"].tolist() == [10, 10]
    assert np.isnan(few["nearest_5_um"]).all()
    assert all(len(column) == 0 for column in neighbourhood(grid[:0]).values())


def test_a_nucleus_out_of_its_crop_has_no_stain_and_every_measure_has_a_column() -> None:
    polygons = np.array([shapely.box(0, 0, 9, 9), shapely.box(500, 500, 509, 509)])
    values = measure_cells(cells(polygons, np.full((2, 60, 60, 3), 99, np.uint8), np.full((2, 2), 4.5)))
    assert {*values} | {measure.column for measure in NEIGHBOURHOOD} == {measure.column for measure in COMPUTED}
    assert np.isnan(values["eosin_od_mean"]).tolist() == [False, True]
    assert {column.dtype for column in values.values()} == {np.dtype(np.float32)}
