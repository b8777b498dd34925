from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from lemon.slides import reader as reader_module
from lemon.slides.reader import RegionError, SlideError, SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.conftest import shared

APERIO = "Aperio Image Library v11\n800x800 |AppMag = {power}"


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return make_tissue(800, seed=1, border_px=60).image


def slide_at(folder: Path, image: np.ndarray, **options: object) -> Path:
    name = "a.svs" if options.get("description") else "a.tiff"
    write_pyramid(folder / name, image, **{"mpp": 0.25, **options})  # type: ignore[arg-type]
    return folder / name


def test_a_slide_at_40x_is_returned_pixel_for_pixel(tmp_path: Path, tissue: np.ndarray) -> None:
    with_mpp = SlideReader(slide_at(tmp_path, tissue, mpp=0.25))
    assert (with_mpp.region(100, 200, width_px=300, height_px=150) == tissue[200:350, 100:400]).all()


def test_beyond_the_edge_a_region_is_white(tmp_path: Path, tissue: np.ndarray) -> None:
    region = SlideReader(slide_at(tmp_path, tissue)).region(-50, 700, width_px=200, height_px=200)
    assert (region[:, :50] == 255).all()
    assert (region[100:] == 255).all()
    assert (region[:100, 50:] == tissue[700:, :150]).all()


@pytest.mark.parametrize("mpp", [0.125, 0.2, 0.2525, 0.5])
def test_regions_have_a_quarter_micrometre_a_pixel_whatever_the_slide_has(
    tmp_path: Path, tissue: np.ndarray, mpp: float
) -> None:
    """The same physical picture at several resolutions gives the same region, up to interpolation."""
    side = round(800 * 0.25 / mpp)
    rescaled = cv2.resize(tissue, (side, side), interpolation=cv2.INTER_AREA if side < 800 else cv2.INTER_CUBIC)
    slide = SlideReader(slide_at(tmp_path, rescaled, mpp=200 / side))
    region = slide.region(200, 160, width_px=256, height_px=256).astype(float)
    wanted = tissue[160:416, 200:456].astype(float)
    smooth = [cv2.GaussianBlur(image, (0, 0), 2.0) for image in (region, wanted)]
    assert np.abs(smooth[0] - smooth[1]).mean() < 1.5
    # A shift of one pixel would be worse: the grids agree.
    shifted = np.roll(smooth[1], 1, axis=1)
    assert np.abs(smooth[0] - smooth[1]).mean() < 0.5 * np.abs(smooth[0] - shifted).mean()


@pytest.mark.parametrize("mpp", [0.228, 0.25, 0.499])
def test_a_pixel_has_the_same_value_in_every_region_that_holds_it(
    tmp_path: Path, tissue: np.ndarray, mpp: float
) -> None:
    slide = SlideReader(slide_at(tmp_path, tissue, mpp=mpp))
    whole = slide.region(0, 0, width_px=400, height_px=400).astype(int)
    part = slide.region(137, 91, width_px=200, height_px=200).astype(int)
    assert np.abs(whole[91:291, 137:337] - part).max() <= 1


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        ({"mpp": 0.31}, 0.31, "file"),
        ({"mpp": None, "description": APERIO.format(power=20) + "|MPP = 0.499"}, 0.499, "file"),
        ({"mpp": None, "description": APERIO.format(power=20)}, 0.5, "magnification"),
        ({"mpp": None}, 0.77, "assumed"),
        ({"mpp": 352.8}, 0.77, "assumed"),  # 72 dots an inch
    ],
)
def test_the_resolution_comes_from_the_file_or_the_magnification_or_is_assumed(
    tmp_path: Path, tissue: np.ndarray, options: dict, mpp: float, source: str
) -> None:
    slide = SlideReader(slide_at(tmp_path, tissue, **options), default_mpp=0.77)
    assert slide.mpp == pytest.approx(mpp, rel=1e-3)
    assert slide.mpp_source == source
    assert slide.mpp_assumed == (source == "assumed")


def test_transparent_pixels_become_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (10, 20, 30, 255)
    rgba[0, 1] = (100, 100, 100, 128)
    white = reader_module._on_white(rgba)
    assert white[0, 0].tolist() == [10, 20, 30]
    assert white[1].tolist() == [[255] * 3] * 2
    assert abs(int(white[0, 1, 0]) - 177) <= 1


def test_bounds_come_from_the_file() -> None:
    names = {"x": 100, "y": 50, "width": 640, "height": 480}
    properties = {f"openslide.bounds-{name}": str(value) for name, value in names.items()}
    assert reader_module._bounds(properties, width_px=2000, height_px=2000) == (100, 50, 640, 480)
    assert reader_module._bounds({}, width_px=2000, height_px=1000) == (0, 0, 2000, 1000)
    # Never more than the slide has: the overview would be as large.
    assert reader_module._bounds(properties, width_px=500, height_px=300) == (100, 50, 400, 250)
    assert reader_module._bounds(properties, width_px=50, height_px=300) == (0, 0, 50, 300)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty"), (b"not a slide\n" * 100, "not a slide"), (None, "not found")]
)
def test_what_is_no_slide_is_refused_with_the_reason(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.svs"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SlideError, match=reason):
        SlideReader(path)


class FailingHandle:
    """Wraps an OpenSlide handle whose reads fail ``failures`` times."""

    def __init__(self, handle: openslide.OpenSlide, failures: list[int]) -> None:
        self._handle, self._failures = handle, failures

    def __getattr__(self, name: str) -> object:
        return getattr(self._handle, name)

    def read_region(self, *args: object) -> object:
        if self._failures[0] > 0:
            self._failures[0] -= 1
            raise openslide.OpenSlideError("corrupt tile")
        return self._handle.read_region(*args)


@pytest.mark.parametrize("failures", [1, 2])
def test_after_a_failed_read_the_slide_is_opened_anew_and_read_once_more(
    tmp_path: Path, tissue: np.ndarray, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    left, opened = [failures], []
    real_open = reader_module._open

    def open_failing(path: str) -> FailingHandle:
        opened.append(path)
        return FailingHandle(real_open(path), left)

    monkeypatch.setattr(reader_module, "_open", open_failing)
    slide = SlideReader(slide_at(tmp_path, tissue))
    if failures == 1:
        assert (slide.region(0, 0, width_px=100, height_px=100) == tissue[:100, :100]).all()
    else:
        with pytest.raises(RegionError, match="corrupt tile"):
            slide.region(0, 0, width_px=100, height_px=100)
    assert len(opened) == 2


def test_the_overview_of_a_slide_without_pyramid_equals_that_of_one_with(tmp_path: Path, tissue: np.ndarray) -> None:
    write_pyramid(tmp_path / "one.tiff", tissue, mpp=0.25, levels=1)
    write_pyramid(tmp_path / "three.tiff", tissue, mpp=0.25, levels=3)
    one, three = (SlideReader(tmp_path / name).overview(mpp=2.0) for name in ("one.tiff", "three.tiff"))
    assert one[0].shape == three[0].shape == (100, 100, 3)
    assert one[1] == pytest.approx(2.0)
    assert np.abs(one[0].astype(int) - three[0]).mean() < 2


def test_a_real_pyramid_gives_the_same_overview_as_its_single_level_original() -> None:
    original = SlideReader(shared("data/slides/CMU-1-Small-Region.svs")).overview(mpp=8.0)[0]
    pyramid = SlideReader(shared("data/slides/CMU-1-Small-Region_pyramid_0.499mpp.tiff")).overview(mpp=8.0)[0]
    assert np.abs(original.astype(int) - pyramid).mean() < 3


def test_a_hamamatsu_slide_opens_with_its_own_resolution() -> None:
    slide = SlideReader(shared("data/slides/test3-DAPI-2-387.ndpi"))
    assert slide.mpp == pytest.approx(0.228, abs=1e-3)
    assert slide.region(0, 0, width_px=64, height_px=64).shape == (64, 64, 3)
