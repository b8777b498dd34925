from __future__ import annotations

import cv2
import numpy as np
import pytest

from lemon.slides.quality import MIN_FOCUS, blurred_share, find_flaws, focus_of_crops, focus_of_region, share_of
from lemon.slides.synthetic import make_tissue
from lemon.slides.tissue import find_tissue

IMAGE = make_tissue(512, seed=0).image


def overview() -> tuple[np.ndarray, np.ndarray]:
    """A slide at 8 um/px, uint8 [100, 100, 3], and its tissue."""
    small = cv2.resize(make_tissue(1600, seed=0, border_px=400).image, (100, 100), interpolation=cv2.INTER_AREA)
    return small, find_tissue(small, mpp=4.0).mask


def through(picture: np.ndarray, layer: np.ndarray | tuple[int, ...], *, box: tuple[slice, slice]) -> np.ndarray:
    """The picture with another layer above a part of it: transmissions multiply."""
    result = picture.astype(float)
    result[box] *= np.asarray(layer, float) / 255
    return result.astype(np.uint8)


def test_clean_tissue_has_no_flaws() -> None:
    picture, tissue = overview()
    flaws = find_flaws(picture, tissue, mpp=4.0)
    assert [share_of(flaws[name], tissue) for name in ("pen", "fold")] == [0, 0]


@pytest.mark.parametrize("ink", [(30, 70, 170), (30, 130, 70), (25, 25, 30)], ids=["blue", "green", "black"])
def test_pen_is_found_where_it_is(ink: tuple[int, int, int]) -> None:
    picture, tissue = overview()
    box = slice(30, 45), slice(30, 70)
    flaws = find_flaws(through(picture, ink, box=box), tissue, mpp=4.0)
    assert flaws["pen"][32:43, 32:68].mean() > 0.9
    flaws["pen"][28:47, 28:72] = False
    assert not flaws["pen"].any()
    assert flaws["fold"].mean() < 0.02


def test_a_fold_is_found_where_tissue_lies_twice() -> None:
    picture, tissue = overview()
    box = slice(40, 60), slice(40, 50)
    flaws = find_flaws(through(picture, picture[box][::-1], box=box), tissue, mpp=4.0)
    assert flaws["fold"][43:57, 42:48].mean() > 0.7
    assert share_of(flaws["fold"], tissue) < 0.15
    assert not flaws["pen"].any()


def test_a_slide_without_tissue_has_no_flaws() -> None:
    picture = np.full((20, 20, 3), 243, np.uint8)
    nothing = np.zeros((20, 20), bool)
    flaws = find_flaws(picture, nothing, mpp=8.0)
    assert not flaws["pen"].any()
    assert not flaws["fold"].any()
    assert share_of(flaws["pen"], nothing) == 0


def test_blur_is_told_and_a_scan_at_20x_is_hardly_another() -> None:
    low = cv2.resize(cv2.resize(IMAGE, (256, 256), interpolation=cv2.INTER_AREA), (512, 512))
    blurred = cv2.GaussianBlur(IMAGE, (0, 0), 6)
    sharp, at_20x, soft = (float(np.median(focus_of_region(image))) for image in (IMAGE, low, blurred))
    assert sharp - at_20x < 0.3
    assert sharp - soft > 1.2
    assert blurred_share([blurred]) == 1
    few = blurred_share([IMAGE])
    assert few is not None
    assert few < 0.3  # made-up tissue is smooth between its nuclei
    assert blurred_share([IMAGE, blurred]) == pytest.approx((1 + few) / 2, abs=0.01)


def test_contrast_does_not_change_the_focus() -> None:
    pale = (255 * (IMAGE / 255.0) ** 0.6).astype(np.uint8)
    difference = focus_of_region(pale) - focus_of_region(IMAGE)
    assert np.abs(difference).max() < 0.3


def test_glass_is_neither_sharp_nor_blurred() -> None:
    glass = np.full((128, 128, 3), 243, np.uint8)
    assert np.isnan(focus_of_region(glass)).all()
    assert blurred_share([glass]) is None
    assert blurred_share([]) is None


def test_crops_have_a_focus_each() -> None:
    crops = np.stack([IMAGE[100:160, 100:160], cv2.GaussianBlur(IMAGE, (0, 0), 6)[100:160, 100:160]])
    sharp, soft = focus_of_crops(crops)
    assert sharp > MIN_FOCUS > soft


def test_the_focus_of_a_crop_is_that_of_a_region_of_its_size_and_not_of_its_neighbours() -> None:
    crops = np.stack([IMAGE[at : at + 64, at : at + 64] for at in range(70)])
    alone = np.concatenate([focus_of_crops(crops[index : index + 1]) for index in range(len(crops))])
    np.testing.assert_allclose(focus_of_crops(crops), alone, atol=1e-4)
    np.testing.assert_allclose(alone, [focus_of_region(crop)[0, 0] for crop in crops], atol=1e-4)
    assert focus_of_crops(crops[:0]).shape == (0,)
