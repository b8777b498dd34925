from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest

from lemon.nuclei.hematoxylin import Calibration, Hematoxylin, calibrate, segment
from tests.conftest import shared

HEMATOXYLIN = (0.65, 0.70, 0.29)  # optical density per unit of stain; Ruifrok and Johnston
EOSIN = (0.07, 0.99, 0.11)
MARGIN_PX = 64


def stained(hematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """RGB uint8 [H, W, 3] of two stain density maps, by Beer and Lambert."""
    od = hematoxylin[..., None] * np.array(HEMATOXYLIN) + eosin[..., None] * np.array(EOSIN)
    return np.clip(np.rint(255 * np.exp(-od)), 0, 255).astype(np.uint8)


def synthetic_tissue(*, size_px: int = 512, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Elliptic nuclei on a jittered grid in textured eosin: image and centres [N, 2] (x, y)."""
    rng = np.random.default_rng(seed)
    texture = cv2.GaussianBlur(rng.standard_normal((size_px, size_px)).astype(np.float32), (0, 0), 6)
    eosin = np.clip(0.3 + 1.5 * texture, 0.1, 0.6)
    hematoxylin = np.full((size_px, size_px), 0.12, np.float32)
    centres = []
    for y in range(32, size_px - 16, 48):
        for x in range(32, size_px - 16, 48):
            cx, cy = x + rng.uniform(-8, 8), y + rng.uniform(-8, 8)
            nucleus = np.zeros_like(hematoxylin)
            axes = (rng.uniform(11, 15), rng.uniform(8, 11))
            cv2.ellipse(nucleus, ((cx, cy), (2 * axes[0], 2 * axes[1]), rng.uniform(0, 180)), 1.0, -1)
            hematoxylin += 1.1 * cv2.GaussianBlur(nucleus, (0, 0), 1.5)
            centres.append((cx, cy))
    noise = rng.normal(0, 2, (size_px, size_px, 3))
    return np.clip(stained(hematoxylin, eosin) + noise, 0, 255).astype(np.uint8), np.array(centres)


def centroids(region: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Centroids [N, 2] (x, y) of the nuclei of a region."""
    nuclei = Hematoxylin().postprocess(region, None, calibration)
    return np.array([nucleus.centroid_px for nucleus in nuclei]).reshape(-1, 2)


def share_within(a: np.ndarray, b: np.ndarray, *, px: float) -> float:
    """Share of points of a that have a point of b within a distance."""
    return float((np.linalg.norm(a[:, None] - b[None], axis=-1).min(axis=1) <= px).mean())


def seam_agreement(tile: np.ndarray) -> float:
    """Lower share, of two, of nuclei found both in the whole tile and in four regions that overlap by 128 px.

    A nucleus is the region's whose inner part holds its centroid; those near the border of the tile do not count.
    """
    height, width = tile.shape[:2]
    calibration = calibrate([tile])
    whole, parts = centroids(tile, calibration), []
    half_y, half_x = height // 2, width // 2
    for y0, y1 in ((0, half_y), (half_y, height)):
        for x0, x1 in ((0, half_x), (half_x, width)):
            top, left = max(y0 - MARGIN_PX, 0), max(x0 - MARGIN_PX, 0)
            region = tile[top : y1 + MARGIN_PX, left : x1 + MARGIN_PX]
            found = centroids(np.ascontiguousarray(region), calibration) + np.array([left, top])
            owned = (found >= (x0, y0)).all(1) & (found < (x1, y1)).all(1)
            parts.append(found[owned])
    joined = np.concatenate(parts)

    def inner(points: np.ndarray) -> np.ndarray:
        low, high = MARGIN_PX, (width - MARGIN_PX, height - MARGIN_PX)
        return points[(points >= low).all(1) & (points < high).all(1)]

    assert len(inner(whole)) > 20
    return min(share_within(inner(whole), joined, px=2), share_within(inner(joined), whole, px=2))


def test_every_nucleus_of_synthetic_tissue_is_found_once_and_nothing_else() -> None:
    image, centres = synthetic_tissue()
    found = centroids(image, calibrate([image]))
    assert len(found) == len(centres)
    assert share_within(centres, found, px=2) == 1


def test_touching_nuclei_are_divided() -> None:
    hematoxylin = np.full((128, 128), 0.1, np.float32)
    for x in (52, 74):
        disc = np.zeros_like(hematoxylin)
        cv2.circle(disc, (x, 64), 12, 1.0, -1)
        hematoxylin = np.maximum(hematoxylin, 1.1 * cv2.GaussianBlur(disc, (0, 0), 2.5))
    image = stained(hematoxylin, np.full((128, 128), 0.3, np.float32))
    found = centroids(image, Calibration(pale_od=0.05, dark_od=0.5))
    assert share_within(np.array([(52, 64), (74, 64)]), found, px=3) == 1
    assert len(found) == 2


def test_a_vesicular_nucleus_is_one_filled_object() -> None:
    hematoxylin = np.full((128, 128), 0.1, np.float32)
    cv2.circle(hematoxylin, (64, 64), 14, 1.0, -1)
    cv2.circle(hematoxylin, (64, 64), 8, 0.2, -1)
    image = stained(cv2.GaussianBlur(hematoxylin, (0, 0), 1), np.full((128, 128), 0.3, np.float32))
    labels = segment(image, calibration=Calibration(pale_od=0.05, dark_od=0.5))
    assert labels.max() == 1
    assert labels[64, 64] == 1
    assert (labels > 0).sum() == pytest.approx(np.pi * 14**2, rel=0.25)


def test_red_blood_cells_are_not_nuclei() -> None:
    eosin = np.full((128, 128), 0.3, np.float32)
    cv2.circle(eosin, (64, 64), 12, 2.5, -1)
    image = stained(np.full((128, 128), 0.1, np.float32), cv2.GaussianBlur(eosin, (0, 0), 1.5))
    assert len(centroids(image, Calibration(pale_od=0.05, dark_od=0.5))) == 0


@pytest.mark.parametrize("ink", [(20, 60, 160), (10, 130, 130)], ids=["blue", "cyan"])
def test_spots_of_ink_are_not_nuclei(ink: tuple[int, int, int]) -> None:
    image = stained(np.full((128, 128), 0.1, np.float32), np.full((128, 128), 0.3, np.float32))
    cv2.circle(image, (64, 64), 12, ink, -1)
    assert len(centroids(image, Calibration(pale_od=0.05, dark_od=0.5))) == 0


def test_the_smallest_area_is_kept_to() -> None:
    image, _ = synthetic_tissue()
    calibration = calibrate([image])
    labels = segment(image, calibration=calibration, min_area_um2=40.0)
    areas_px = np.bincount(labels.ravel())[1:]
    assert areas_px.min() >= 40.0 / 0.25**2
    assert 0 < labels.max() < segment(image, calibration=calibration).max()


def test_overlapping_regions_of_synthetic_tissue_give_the_same_nuclei() -> None:
    image, _ = synthetic_tissue(size_px=640, seed=1)
    assert seam_agreement(image) >= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hoverfast_tcga_tile.png", "hgsc_nest.jpg"])
def test_overlapping_regions_of_a_real_tile_give_the_same_nuclei(name: str) -> None:
    tile = cv2.cvtColor(cv2.imread(str(shared(f"data/tiles/{name}"))), cv2.COLOR_BGR2RGB)
    assert seam_agreement(tile) >= 0.98


def test_a_shift_by_one_pixel_moves_the_nuclei_by_one_pixel() -> None:
    image, _ = synthetic_tissue()
    calibration = calibrate([image])
    whole, shifted = centroids(image, calibration), centroids(np.ascontiguousarray(image[1:, 1:]), calibration) + 1
    assert share_within(whole, shifted, px=2) >= 0.98


def test_calibration_is_frozen_and_survives_pickling_as_does_the_postprocess() -> None:
    image, _ = synthetic_tissue(size_px=256)
    segmenter = Hematoxylin()
    calibration = segmenter.calibrate([image])
    again, postprocess = pickle.loads(pickle.dumps((calibration, segmenter.postprocess)))  # noqa: S301 (written one call before)
    assert again == calibration
    first, second = segmenter.postprocess(image, None, calibration), postprocess(image, None, again)
    assert [n.centroid_px for n in first] == [n.centroid_px for n in second] != []
    with pytest.raises(AttributeError):
        calibration.dark_od = 1.0


def test_glass_does_not_change_the_calibration() -> None:
    image, _ = synthetic_tissue()
    glass = np.full((2048, 2048, 3), 244, np.uint8)
    glass[:512, :512] = image
    alone, among_glass = calibrate([image]), calibrate([glass, glass])
    assert among_glass.pale_od == pytest.approx(alone.pale_od, abs=0.02)
    assert among_glass.dark_od == pytest.approx(alone.dark_od, abs=0.02)


@pytest.mark.parametrize("ink", [(10, 10, 12), (20, 60, 160), (30, 120, 60)], ids=["black", "blue", "green"])
def test_pen_does_not_change_the_calibration(ink: tuple[int, int, int]) -> None:
    image, _ = synthetic_tissue()
    marked = image.copy()
    marked[:, :128] = ink
    alone, with_pen = calibrate([image]), calibrate([marked])
    assert with_pen.dark_od == pytest.approx(alone.dark_od, abs=0.03)
    assert with_pen.pale_od == pytest.approx(alone.pale_od, abs=0.03)


@pytest.mark.parametrize("value", [0, 128, 200, 255])
def test_constant_images_calibrate_and_hold_no_nuclei(value: int) -> None:
    image = np.full((130, 150, 3), value, np.uint8)
    calibration = calibrate([image])
    assert calibration.dark_od > calibration.pale_od
    assert segment(image, calibration=calibration).max() == 0


def test_a_slide_without_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one tissue region"):
        Hematoxylin().calibrate([])


@pytest.mark.parametrize("bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)])
def test_what_is_not_an_rgb_region_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="uint8"):
        segment(bad, calibration=Calibration(pale_od=0.1, dark_od=0.6))


@pytest.mark.parametrize("arguments", [{"min_area_um2": 0}, {"min_score": 1.0}, {"um_per_px": -0.25}])
def test_bad_settings_name_themselves(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Hematoxylin(**arguments)


def test_the_prediction_is_one_none_a_region() -> None:
    assert Hematoxylin().predict(np.zeros((3, 64, 64, 3), np.uint8)) == [None, None, None]


@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (61, 63)])
def test_regions_of_any_size_give_labels_of_that_size(shape: tuple[int, int]) -> None:
    region = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = segment(region, calibration=Calibration(pale_od=0.1, dark_od=0.6))
    assert labels.shape == shape
    assert labels.dtype == np.int32
