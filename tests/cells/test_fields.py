"""Images that are cut from slides at another scale than the table's."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from lemon.cells import fields
from lemon.cells.cache import CachedImages
from lemon.cells.fields import with_fields
from lemon.cells.images import part_images, read_images, sample_images
from lemon.cells.names import shard_name
from lemon.cells.select import Selection, select_cells
from lemon.errors import ConfigError, FatalError
from lemon.runtime.store import Store
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.cells_table import TISSUE_MPP, TISSUE_PX, table_of_a_slide


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A table; its slide is read in several blocks, and few fields are in memory at once."""
    monkeypatch.setattr(fields, "BLOCK_PX", 300)
    monkeypatch.setattr(fields, "PX_AT_A_TIME", 5 * 180**2)
    return table_of_a_slide(tmp_path)


def shown(cells: Store, *, side_px: int) -> np.ndarray:
    """Squares around the cells, read one by one and shrunk to 60 px."""
    shard, squares = cells.read_table(shard_name("s")), []
    with SlideReader(Path(cells.uri).parent / "s.tiff") as reader:
        for x, y in zip(shard["x_level0_px"].to_pylist(), shard["y_level0_px"].to_pylist(), strict=True):
            corner = [round(each * TISSUE_MPP / 0.25 - 0.5 - (side_px - 1) / 2) for each in (x, y)]
            square = reader.region(*corner, width_px=side_px, height_px=side_px)
            squares.append(cv2.resize(square, (60, 60), interpolation=cv2.INTER_AREA))
    return np.stack(squares)


def read_all(selection: Selection, cache: Path) -> np.ndarray:
    images = CachedImages(selection, cache=cache, cache_gb=1)
    out = np.empty((selection.n_cells, 60, 60, 3), np.uint8)
    images.read(np.arange(selection.n_cells), out)
    images.close()
    return out


def test_fields_are_what_the_slide_shows_in_the_order_of_the_cells(cells: Store) -> None:
    selection = with_fields(select_cells(cells), um=30)
    expected = shown(cells, side_px=180)  # 45 um: 60 px, of which a view has 40
    np.testing.assert_array_equal(read_images(selection), expected)
    pieces = list(part_images(selection, selection.parts[0], first=3, last=28, rows=10))
    assert [len(piece) for piece in pieces] == [10, 10, 5]
    np.testing.assert_array_equal(np.concatenate(pieces), expected[3:28])
    np.testing.assert_array_equal(sample_images(selection, count=7), expected[:7])


def test_the_cache_tells_fields_from_images_of_nuclei_and_adds_to_its_files(cells: Store, tmp_path: Path) -> None:
    plain, cache = select_cells(cells), tmp_path / "cache"
    wide, wider = with_fields(plain, um=30), with_fields(plain, um=60)
    assert len({each.fingerprint for each in (plain, wide, wider)}) == 3
    few = with_fields(select_cells(cells, n_cells=9), um=30)
    np.testing.assert_array_equal(read_all(few, cache), shown(cells, side_px=180)[:9])
    np.testing.assert_array_equal(read_all(wide, cache), shown(cells, side_px=180))
    np.testing.assert_array_equal(read_all(wider, cache), shown(cells, side_px=360))
    np.testing.assert_array_equal(read_all(plain, cache), read_images(plain))


@pytest.mark.parametrize(
    ("fault", "line"), [("gone", r"slides \(s\) are not there"), ("other", r"slides \(s\) are other files")]
)
def test_a_slide_that_is_not_that_of_its_cells_is_refused(cells: Store, tmp_path: Path, fault: str, line: str) -> None:
    (tmp_path / "s.tiff").unlink()
    if fault == "other":
        write_pyramid(tmp_path / "s.tiff", make_tissue(TISSUE_PX, seed=2).image, mpp=TISSUE_MPP)
    with pytest.raises(ConfigError, match=rf"^field_um: 1 of 1 {line}.*s\.tiff; expected those"):
        with_fields(select_cells(cells), um=30)


def test_a_slide_that_cannot_be_read_is_told_with_its_path(cells: Store, tmp_path: Path) -> None:
    selection = with_fields(select_cells(cells), um=30)
    (tmp_path / "s.tiff").write_bytes(b"no slide")
    with pytest.raises(ConfigError, match=r"^field_um: s: .*s\.tiff: .*leave the slide out with select\.slides"):
        read_images(selection)


def test_a_full_scratch_disk_is_told_with_where_it_is(cells: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = with_fields(select_cells(cells), um=30)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(FatalError, match=r"cannot keep fields in .*No space left.*TMPDIR"):
        read_images(selection)
