from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tifffile

from lemon.slides.errors import SlideError
from lemon.slides.reader import SlideReader
from lemon.slides.resolution import Resolution, find_resolution
from lemon.slides.synthetic import make_tissue
from tests.slides.dicom import write_slide

IMAGE = make_tissue(512, seed=1).image


def ome(x: float, y: float, unit: str | None = "µm") -> dict[str, Any]:
    units = {} if unit is None else {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    return {"axes": "YXS", "PhysicalSizeX": x, "PhysicalSizeY": y, **units}


def per_cm(x_mpp: float, y_mpp: float) -> dict[str, Any]:
    return {"resolution": (1e4 / x_mpp, 1e4 / y_mpp), "resolutionunit": "CENTIMETER"}


def tiff_at(folder: Path, name: str = "a.tif", **options: Any) -> Path:
    tifffile.imwrite(folder / name, IMAGE, photometric="rgb", tile=(256, 256), **{"metadata": None, **options})
    return folder / name


def aperio(description: str, **options: Any) -> dict[str, Any]:
    return {"name": "a.svs", "description": f"Aperio Image Library v11\n512x512 |{description}", **options}


IMAGEJ = "ImageJ=1.54f\nunit={unit}\n"


@pytest.mark.parametrize(
    ("options", "mpp", "source"),
    [
        (per_cm(0.31, 0.31), 0.31, "file"),
        ({"name": "a.ome.tif", "metadata": ome(0.5, 0.5)}, 0.5, "ome"),
        ({"name": "a.ome.tif", "metadata": ome(500, 500, "nm")}, 0.5, "ome"),
        ({"name": "a.ome.tif", "metadata": ome(0.0005, 0.0005, "mm")}, 0.5, "ome"),
        ({"name": "a.ome.tif", "metadata": ome(0.5, 0.5, None)}, 0.5, "ome"),
        ({"description": IMAGEJ.format(unit="micron"), "resolution": (2, 2), "resolutionunit": "NONE"}, 0.5, "imagej"),
        (
            {"description": IMAGEJ.format(unit="\\u00B5m"), "resolution": (2, 2), "resolutionunit": "NONE"},
            0.5,
            "imagej",
        ),
        (
            {"description": IMAGEJ.format(unit="cm"), "resolution": (2e4, 2e4), "resolutionunit": "NONE"},
            0.5,
            "imagej",
        ),
        (aperio("AppMag = 20|MPP = 0.499"), 0.499, "file"),
        (aperio("AppMag = 20"), 0.5, "magnification"),
    ],
)
def test_a_resolution_is_found_wherever_a_file_states_it(
    tmp_path: Path, options: dict[str, Any], mpp: float, source: str
) -> None:
    slide = SlideReader(tiff_at(tmp_path, **options), default_mpp=0.77)
    assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp, rel=1e-4), source)
    assert slide.notes == ()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"resolution": (72, 72), "resolutionunit": "INCH"},
        per_cm(250, 250),
        per_cm(0.001, 0.001),
        {"name": "a.ome.tif", "metadata": ome(0.25, 0.25, "pixel")},
        {"name": "a.ome.tif", "metadata": ome(25, 25)},
        aperio("MPP = inf"),
        aperio("MPP = -0.25"),
        aperio("MPP = nan|AppMag = 0"),
    ],
)
def test_what_is_missing_or_cannot_be_right_is_assumed_and_told(tmp_path: Path, options: dict[str, Any]) -> None:
    slide = SlideReader(tiff_at(tmp_path, **options), default_mpp=0.77)
    assert (slide.mpp, slide.mpp_source, slide.mpp_assumed) == (0.77, "assumed", True)
    assert "0.77 assumed" in slide.notes[-1]


@pytest.mark.parametrize(
    "options",
    [
        per_cm(0.25, 0.5),
        per_cm(0.25, 0.26),
        {"name": "a.ome.tif", "metadata": ome(0.25, 0.5)},
        {"description": IMAGEJ.format(unit="um"), "resolution": (4, 2), "resolutionunit": "NONE"},
    ],
)
def test_pixels_that_are_not_square_are_refused_and_never_averaged(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tiff_at(tmp_path, **options)
    with pytest.raises(SlideError, match=r"not square: 0\.25 x 0\.\d+ um .*resample"):
        SlideReader(path)
    given = SlideReader(path, mpp=0.3)
    assert given.mpp == 0.3
    assert "0.3 as given" in given.notes[0]


def test_a_dicom_slide_is_no_exception(tmp_path: Path) -> None:
    write_slide(tmp_path / "a", IMAGE, mpp=(0.5, 0.5))
    write_slide(tmp_path / "b", IMAGE, mpp=(0.25, 0.5))
    assert SlideReader(tmp_path / "a" / "level_1.dcm").mpp == pytest.approx(0.5)
    with pytest.raises(SlideError, match="not square"):
        SlideReader(tmp_path / "b" / "level_1.dcm")


def test_a_scanners_own_difference_of_axes_is_no_reason_to_refuse() -> None:
    properties = {"openslide.mpp-x": "0.45641", "openslide.mpp-y": "0.45506"}  # CMU-1.ndpi
    assert find_resolution(properties, default_mpp=1.0) == Resolution(pytest.approx(0.455735), "file")


def test_sources_that_contradict_each_other_are_told(tmp_path: Path) -> None:
    both = SlideReader(tiff_at(tmp_path, "a.ome.tif", metadata=ome(0.5, 0.5), **per_cm(0.25, 0.25)))
    assert both.mpp == 0.5
    assert both.notes == ("um/px 0.5 of the OME-XML taken; the header says 0.25",)
    power = find_resolution({"openslide.mpp-x": "0.25", "openslide.objective-power": "10"}, default_mpp=1)
    assert power.notes == ("um/px 0.25 of the header taken; the objective's power says 1",)
    assert find_resolution({"openslide.mpp-x": "0.228", "openslide.objective-power": "40"}, default_mpp=1).notes == ()


@pytest.mark.parametrize(("given", "told"), [(0.25, 0), (0.255, 0), (0.5, 1)])
def test_what_the_user_states_outranks_the_file_and_a_difference_is_told(
    tmp_path: Path, given: float, told: int
) -> None:
    slide = SlideReader(tiff_at(tmp_path, **per_cm(0.25, 0.25)), mpp=given)
    assert (slide.mpp, slide.mpp_source, slide.mpp_assumed, len(slide.notes)) == (given, "given", False, told)


def test_a_tiff_resolution_without_openslides_own_is_the_last_choice() -> None:
    properties = {"tiff.XResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
    assert find_resolution(properties, default_mpp=1.0) == Resolution(0.25, "tiff")


@pytest.mark.parametrize(
    "xml",
    [
        '<OME><Image><Pixels PhysicalSizeX="0.5"',
        '<!DOCTYPE x [<!ENTITY a "b">]><OME><Pixels PhysicalSizeX="0.5"/></OME>',
        "<OME/>",
        '<OME><Pixels PhysicalSizeX="many"/></OME>',
    ],
)
def test_damaged_or_hostile_xml_states_nothing(xml: str) -> None:
    assert find_resolution({"tiff.ImageDescription": xml}, default_mpp=0.9).source == "assumed"
