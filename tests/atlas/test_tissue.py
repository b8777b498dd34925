"""Pictures of slides for the page, and outlines of cells: where a cell lies in them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
from PIL import Image

from lemon.atlas import tissue
from lemon.atlas.tissue import OUTLINE_UM, outlines_of, pictures_of
from lemon.schema import SlideRow
from lemon.slides.synthetic import write_pyramid


def row_of(slide_id: str, path: Path, **columns: float) -> SlideRow:
    """A row of the slides table of a slide of 400 x 300 px at 0.5 um/px."""
    sizes = {"mpp": 0.5, "width_px": 400, "height_px": 300} | columns
    return SlideRow(slide_id, str(path), **sizes, n_cells=1, status="done")  # type: ignore[arg-type]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    image = np.full((300, 400, 3), 240, np.uint8)
    image[200:220, 100:140] = (120, 20, 90)
    path = tmp_path / "slide.tiff"
    write_pyramid(path, image, mpp=0.5)
    return path


@pytest.mark.parametrize("side_px", [400, 200])
def test_a_picture_shows_a_place_of_the_slide_where_its_frame_says(slide: Path, side_px: int) -> None:
    (picture,) = pictures_of([row_of("a", slide)], side_px=side_px)
    image = np.asarray(Image.open(io.BytesIO(picture.jpeg)))
    assert image.shape == (picture.height, picture.width, 3)
    assert max(image.shape) == side_px
    x, y = (np.array([120, 210]) - (picture.x, picture.y)) * picture.scale
    assert np.abs(image[round(y), round(x)].astype(int) - (120, 20, 90)).max() < 25  # JPEG's
    assert image[round(y) - 40, round(x)].min() > 225
    assert (picture.mpp, picture.fault) == (0.5, None)


def test_many_slides_share_the_pixels_that_a_page_may_have(slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tissue, "MOST_PX", 4 * 100**2)
    rows = [row_of(name, slide) for name in "abcd"]
    assert [max(picture.width, picture.height) for picture in pictures_of(rows, side_px=400)] == [100] * 4


def test_a_slide_that_is_gone_or_another_is_white_and_named(
    slide: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row_of("gone", tmp_path / "gone.svs"), row_of("other", slide, width_px=500), row_of("here", slide)]
    gone, other, here = pictures_of(rows, side_px=200)
    assert np.asarray(Image.open(io.BytesIO(gone.jpeg))).min() == 255
    assert (gone.width / gone.scale, gone.height / gone.scale) == (400, 300)
    assert "not the slide that was curated: 400 x 300 px" in (other.fault or "")
    assert here.fault is None
    (line,) = caplog.messages
    assert "tissue of 2 of 3 slides is not shown" in line
    assert "gone.svs" in line


def test_outlines_are_the_polygons_within_a_step() -> None:
    circle = shapely.Point(1000.3, 2000.7).buffer(12, quad_segs=16)
    far = shapely.box(0, 0, 4000, 10)
    polygons = pa.chunked_array([[circle.wkb, b""], [far.wkb]])
    centres = np.array([[1000.0, 2000.0], [5, 5], [2000, 5]])
    mpp = np.array([0.25, 0.25, 0.25])
    counts, offsets = outlines_of(polygons, centres, mpp)
    assert counts[1] == 0
    ring = shapely.Polygon(centres[0] + offsets[: counts[0]] * OUTLINE_UM / 0.25)
    assert counts[0] < len(circle.exterior.coords) / 2
    assert ring.hausdorff_distance(circle) < 2 * OUTLINE_UM / 0.25
    assert np.abs(offsets[counts[0] :, 0]).max() == 127  # cut, not wrapped
    assert counts.sum() == len(offsets)
