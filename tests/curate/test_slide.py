"""A slide that must not be trusted is a failed row with its reason, one that may be has its notes; no Ray in here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from lemon import schema
from lemon.cells.ledger import cells_ledger, read_ledger
from lemon.cells.names import shard_name
from lemon.curate.config import CurateConfig
from lemon.curate.slide import curate_slide
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.slides import reader as reader_module
from lemon.slides.cohort import list_slides
from lemon.slides.errors import RegionError
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.slides.dicom import write_slide

IMAGE = make_tissue(800, seed=3, border_px=80).image
GREY = cv2.cvtColor(IMAGE, cv2.COLOR_RGB2GRAY)


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def curate(source: Path, output: Path, threads: ThreadPoolExecutor, *words: str) -> list[dict[str, Any]]:
    """The rows of a job's slides, through the ledger, as an actor commits them."""
    config = load("curate", [f"slides={source}", f"output={output}", "region_px=512", *words], CurateConfig)
    ledger = cells_ledger(Store(output), config_fingerprint="f")
    for slide in list_slides(str(source)):
        segmenter = config.segmenter.build()
        ledger.commit(curate_slide(slide, config=config, segmenter=segmenter, processes=threads, store=ledger.store))
    return read_ledger(ledger.store).to_pylist()


def tiff(path: Path, image: np.ndarray = IMAGE, **options: Any) -> Path:
    photometric = "rgb" if image.ndim == 3 else "minisblack"
    quarter = {"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER", "metadata": None}
    tifffile.imwrite(path, image, photometric=photometric, **{"tile": (256, 256), **quarter, **options})
    return path


def like_grey(*, quality: int | None = None, noise: float = 0, tint: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    image = np.repeat(GREY[..., None], 3, axis=2) * np.array(tint)
    image = np.clip(image + np.random.default_rng(0).normal(0, noise, image.shape), 0, 255).astype(np.uint8)
    return image if quality is None else cv2.imdecode(cv2.imencode(".jpg", image, [1, quality])[1], 1)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (GREY, "no colour"),
        (like_grey(), "no colour"),
        (like_grey(quality=20), "no colour"),
        (like_grey(noise=4), "no colour"),
        (like_grey(tint=(1, 0.97, 0.9)), "no colour"),
        (255 - IMAGE, "not H&E"),
        (255 - GREY, "not H&E"),
        (IMAGE // 20, "dark background"),
        (IMAGE[..., [2, 0, 1]], "green not highest"),
        (IMAGE.astype(np.uint16) * 257, "16 bits a channel"),
    ],
)
def test_what_is_no_he_is_a_failed_row(
    tmp_path: Path, threads: ThreadPoolExecutor, image: np.ndarray, reason: str
) -> None:
    (row,) = curate(tiff(tmp_path / "s.tif", image), tmp_path / "out", threads)
    assert (row["status"], row["n_cells"]) == ("failed", 0)
    assert reason in row["error"]


def test_a_grey_slide_is_refused_also_where_it_cannot_be_seen_as_a_whole(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object, **__: object) -> None:
        raise RegionError("corrupt tile")

    monkeypatch.setattr(reader_module.SlideReader, "overview", unreadable)
    tiff(tmp_path / "grey.tif", GREY)
    tiff(tmp_path / "he.tif")
    he, grey = curate(tmp_path, tmp_path / "out", threads)[::-1]
    assert (grey["status"], he["status"]) == ("failed", "done")
    assert "no colour" in grey["error"]


def test_pixels_that_are_not_square_fail_a_slide_and_a_cohort_may_say_better(
    tmp_path: Path, threads: ThreadPoolExecutor
) -> None:
    tiff(tmp_path / "a.tif", resolution=(40_000, 20_000))
    (row,) = curate(tmp_path / "a.tif", tmp_path / "out", threads)
    assert row["status"] == "failed"
    assert "not square: 0.25 x 0.5" in row["error"]
    (tmp_path / "c.csv").write_text("path,mpp\na.tif,0.25\n")
    (row,) = curate(tmp_path / "c.csv", tmp_path / "out", threads)
    assert (row["status"], row["mpp"], row["mpp_assumed"]) == ("done", 0.25, False)
    assert row["error"] == "um/px 0.25 as given; the header says 0.25 x 0.5"


def test_a_cohorts_resolution_counts_for_the_cells(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    tiff(tmp_path / "a.tif")
    (tmp_path / "c.csv").write_text("path,mpp\na.tif,0.5\n")
    (row,) = curate(tmp_path / "c.csv", tmp_path / "out", threads)
    assert (row["mpp"], row["error"]) == (0.5, "um/px 0.5 as given; the header says 0.25")
    assert set(pq.read_table(tmp_path / "out" / shard_name("a"))["mpp"].to_pylist()) == {0.5}


def test_the_xml_of_an_ome_tiff_gives_the_resolution(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    sizes = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tiff(tmp_path / "a.ome.tif", metadata=sizes, resolution=None, resolutionunit=None)
    (row,) = curate(tmp_path / "a.ome.tif", tmp_path / "out", threads)
    assert (row["status"], row["mpp"], row["mpp_assumed"], row["error"]) == ("done", 0.5, False, None)


def test_a_slide_of_dicom_is_curated_once(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    write_slide(tmp_path / "slide", IMAGE)
    (row,) = curate(tmp_path / "slide", tmp_path / "out", threads)
    assert (row["status"], row["mpp"], row["width_px"]) == ("done", 0.25, 800)
    assert row["n_cells"] > 20


def test_a_slide_that_takes_too_long_or_too_much_fails_and_the_next_is_done(
    tmp_path: Path, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s").mkdir()
    noise = np.random.default_rng(0).integers(0, 8, (2048, 2048, 3), np.uint8) + IMAGE[300, 300] // 2
    tiff(tmp_path / "s" / "1_slow.tif", noise.astype(np.uint8), tile=(2048, 2048), compression="zlib")
    tiff(tmp_path / "s" / "2_huge.tif", np.zeros((9000, 9000), np.uint8), tile=(9008, 9008), compression="zlib")
    tiff(tmp_path / "s" / "3_good.tif")
    real = reader_module.SlideReader.__init__

    def hurried(self: Any, path: str, **options: Any) -> None:
        real(self, path, **options)
        self._limit_s = 0.001 if "slow" in path else self._limit_s

    monkeypatch.setattr(reader_module.SlideReader, "__init__", hurried)
    slow, huge, good = curate(tmp_path / "s", tmp_path / "out", threads, "region_limit_s=77")
    assert [row["status"] for row in (slow, huge, good)] == ["failed", "failed", "done"]
    assert "took over 0.001 s" in slow["error"]
    assert "a tile of 9008 x 9008 px" in huge["error"]
    assert sorted(path.name for path in (tmp_path / "out" / "cells").iterdir()) == ["3_good.parquet"]


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_limit_of_time_is_positive(tmp_path: Path, seconds: str) -> None:
    with pytest.raises(ValueError, match="region_limit_s"):
        load("curate", ["slides=x", "output=y", f"region_limit_s={seconds}"], CurateConfig)


NAMES = ["线" * 34, "x" * 240, "a.tmp-b", "a\nb", "-rf", 'it\'s "x"', "😀", "con", "%2e", ".tif"]


def test_slides_of_any_name_are_done_and_committed(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    write_pyramid(tmp_path / "a.tiff", IMAGE[300:600, 300:600], mpp=0.25)
    names = [f"{name}.tiff" for name in NAMES] + [os.fsdecode(b"Mamma\xe9.tiff")]
    for name in names:
        (folder / name).write_bytes((tmp_path / "a.tiff").read_bytes())
    rows = curate(folder, tmp_path / "out", threads, "geojson=true", "cells_per_slide=5")
    seen = [name.removesuffix(".tiff") for name in names if not name.startswith(".")]
    assert {row["slide_id"] for row in rows} == {name.replace("\udce9", r"\xe9") for name in seen}
    assert {row["status"] for row in rows} == {"done"}
    assert all(pq.read_table(tmp_path / "out" / shard_name(row["slide_id"])).num_rows == 5 for row in rows)
    pa.Table.from_pylist(rows, schema=schema.SLIDES)
