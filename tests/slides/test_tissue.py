from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from lemon.slides.reader import SlideError, SlideReader
from lemon.slides.synthetic import make_tissue
from lemon.slides.tissue import find_tissue, read_mask, reason_not_he
from tests.conftest import shared


def overview_of(image: np.ndarray) -> np.ndarray:
    return cv2.resize(image, None, fx=1 / 16, fy=1 / 16, interpolation=cv2.INTER_AREA)


def test_tissue_is_found_and_glass_is_not() -> None:
    overview = overview_of(make_tissue(1600, seed=0, border_px=400).image)
    tissue = find_tissue(overview, mpp=4.0)
    assert tissue.mask[30:70, 30:70].mean() > 0.95
    assert tissue.mask[:20].mean() < 0.02
    assert tissue.share == pytest.approx(0.25, abs=0.08)


def test_a_white_slide_has_no_tissue() -> None:
    rng = np.random.default_rng(0)
    white = np.clip(245 + rng.normal(0, 1.5, (100, 100, 3)), 0, 255).astype(np.uint8)
    assert find_tissue(white, mpp=8.0).share == 0
    assert find_tissue(np.full((50, 50, 3), 255, np.uint8), mpp=8.0).share == 0


def test_a_crop_without_glass_is_tissue_throughout() -> None:
    overview = overview_of(make_tissue(1600, seed=0).image)[5:-5, 5:-5]
    assert find_tissue(overview, mpp=4.0).share > 0.95


def test_specks_of_dirt_are_left_out() -> None:
    image = np.full((100, 100, 3), 245, np.uint8)
    image[50:52, 50:52] = 90
    assert find_tissue(image, mpp=8.0).share == 0


def test_half_of_the_real_slide_is_tissue() -> None:
    overview, mpp = SlideReader(shared("data/slides/CMU-1-Small-Region.svs")).overview(mpp=8.0)
    assert 0.35 < find_tissue(overview, mpp=mpp).share < 0.5


def test_he_is_accepted_and_fluorescence_and_brown_are_rejected_with_a_reason() -> None:
    he = overview_of(make_tissue(800, seed=0).image)
    everywhere = np.ones(he.shape[:2], bool)
    assert reason_not_he(he, everywhere) is None
    assert "fluorescence" in str(reason_not_he(np.full_like(he, 5), everywhere))
    brown = np.broadcast_to(np.array([150, 100, 60], np.uint8), he.shape)
    assert "green" in str(reason_not_he(brown, everywhere)) or "G should be highest" in str(
        reason_not_he(brown, everywhere)
    )


@pytest.mark.parametrize("tint", [(1.0, 1.0, 1.0), (1.0, 0.97, 0.9), (0.9, 0.95, 1.0)])
@pytest.mark.parametrize("change", ["none", "noise", "jpeg", "dark", "inked"])
def test_a_greyscale_picture_of_a_real_slide_is_refused_and_its_own_colours_are_not(
    tint: tuple[float, float, float], change: str
) -> None:
    colour, mpp = SlideReader(shared("data/slides/CMU-1-Small-Region.svs")).overview(mpp=8.0)
    grey = np.repeat(cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    for image, is_he in ((colour, True), (grey, False)):
        changed = image * np.array(tint if not is_he else (1, 1, 1))
        if change == "noise":
            changed = changed + np.random.default_rng(0).normal(0, 4, image.shape)
        changed = np.clip(changed * (0.6 if change == "dark" else 1), 0, 255).astype(np.uint8)
        if change == "jpeg":
            changed = cv2.imdecode(cv2.imencode(".jpg", changed, [cv2.IMWRITE_JPEG_QUALITY, 25])[1], cv2.IMREAD_COLOR)
        if change == "inked":  # a black pen over much of the slide
            changed[40:120, 20:200] = 20
        reason = reason_not_he(changed, find_tissue(changed, mpp=mpp).mask)
        assert (reason is None) == is_he, reason


@pytest.mark.parametrize("folder", ["cpm15", "dsb2018_he", "consep_train"])
def test_real_pictures_of_he_pass(folder: str) -> None:
    for path in sorted(shared(f"data/masks/{folder}").glob("*.jpg")):
        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        small = overview_of(image)
        assert reason_not_he(small, find_tissue(small, mpp=4.0).mask) is None, path.name


def test_the_fluorescence_slide_is_recognised() -> None:
    overview, mpp = SlideReader(shared("data/slides/test3-DAPI-2-387.ndpi")).overview(mpp=8.0)
    assert "fluorescence" in str(reason_not_he(overview, find_tissue(overview, mpp=mpp).mask))


def test_a_given_mask_is_read_at_any_size_and_an_absent_one_is_named(tmp_path: Path) -> None:
    mask = np.zeros((10, 20), np.uint8)
    mask[:, 10:] = 1
    cv2.imwrite(str(tmp_path / "m.png"), mask)
    assert read_mask(tmp_path / "m.png").share == 0.5
    with pytest.raises(SlideError, match=r"none\.png"):
        read_mask(tmp_path / "none.png")
