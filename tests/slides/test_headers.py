from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from lemon.slides import headers
from lemon.slides.errors import SlideError
from lemon.slides.headers import check_tiff, read_instance
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from tests.conftest import shared
from tests.slides.dicom import write_instance, write_slide

IMAGE = make_tissue(600, seed=1).image


def tiff(path: Path, image: np.ndarray = IMAGE, **options: Any) -> None:
    tifffile.imwrite(path, image, **{"photometric": "rgb", "metadata": None, **options})


def encoded(path: Path) -> None:
    cv2.imwrite(str(path), IMAGE)


def cut(path: Path, *, share: float) -> None:
    write_pyramid(path, IMAGE, mpp=0.25)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("strip.tif", tiff, r"strips, not tiled: convert it with `vips tiffsave IN OUT.tiff --tile --pyramid"),
        ("strip.svs", tiff, r"strips, not tiled: convert it with `vips tiffsave"),
        ("lzma.tif", lambda p: tiff(p, tile=(256, 256), compression="lzma"), r"compression LZMA: convert it with"),
        (
            "deep.tif",
            lambda p: tiff(p, IMAGE.astype(np.uint16) * 257, tile=(256, 256)),
            r"16 bits a .*vips cast",
        ),
        ("float.tif", lambda p: tiff(p, IMAGE / np.float32(255), tile=(256, 256)), r"32 bits a channel.*vips cast"),
        ("mask.tif", lambda p: tiff(p, IMAGE[..., 0] > 9, tile=(256, 256), photometric="minisblack"), r"1 bits a"),
        ("plain.png", encoded, "a PNG image: convert it with `vips tiffsave"),
        ("plain.jpg", encoded, "a JPEG image: convert it with `vips tiffsave"),
        ("plain.bmp", encoded, "a BMP image: convert it with"),
        ("half.tiff", lambda p: cut(p, share=0.5), "a truncated TIFF .*copy or download it again"),
        ("start.tiff", lambda p: cut(p, share=0.001), "a truncated TIFF .*copy or download it again"),
        ("alone.mrxs", lambda p: p.write_bytes(b"\xff\xd8\xff\xe0"), "MIRAX slide without its folder"),
        ("page.svs", lambda p: p.write_text("\n<!DOCTYPE html><html>"), "a web page: the download failed"),
        ("lfs.svs", lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        ("zip.svs", lambda p: p.write_bytes(b"PK\x03\x04 and more"), "a ZIP archive: unpack it"),
        ("text.svs", lambda p: p.write_text("not a slide\n"), "truncated, or another kind of file"),
        ("pipe.svs", os.mkfifo, "no regular file"),
        ("folder.svs", Path.mkdir, "a folder; expected a file of a slide"),
    ],
)
def test_each_kind_of_file_that_is_no_slide_has_its_own_reason_and_remedy(
    tmp_path: Path, name: str, write: Any, reason: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(SlideError, match=reason) as caught:
        SlideReader(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_tiles_beyond_the_end_of_a_slide_that_opens_are_told(tmp_path: Path) -> None:
    tiff(tmp_path / "a.tif", tile=(256, 256), compression="zlib", resolution=(40000, 40000), resolutionunit=3)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        last = file.pages.first.dataoffsets[-1]
    os.truncate(tmp_path / "a.tif", last + 10)
    assert check_tiff(str(tmp_path / "a.tif")) == ["truncated: 1 of 9 tiles lie beyond the file's end"]


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region_pyramid_0.499mpp.tiff", "test3-DAPI-2-387.ndpi"]
)
def test_real_slides_have_nothing_remarkable(name: str) -> None:
    assert check_tiff(str(shared(f"data/slides/{name}"))) == []
    assert SlideReader(shared(f"data/slides/{name}")).notes == ()


def write_repeating(path: Path, *, side_px: int, tile_px: int) -> None:
    """A BigTIFF in which every tile is the same few bytes."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes([230, 150, 200]) * tile_px) for _ in range(tile_px)) + packer.flush()
    count = (-(-side_px // tile_px)) ** 2
    offsets = 16 + len(data)
    directory = offsets + 16 * count
    bits = int.from_bytes(struct.pack("<4H", 8, 8, 8, 0), "little")
    tags = [(256, 4, 1, side_px), (257, 4, 1, side_px), (258, 3, 3, bits), (259, 3, 1, 8), (262, 3, 1, 2)]
    tags += [(277, 3, 1, 3), (284, 3, 1, 1), (322, 4, 1, tile_px), (323, 4, 1, tile_px)]
    where = (offsets, offsets + 8 * count) if count > 1 else (16, len(data))
    tags += [(324, 16, count, where[0]), (325, 16, count, where[1])]
    with path.open("wb") as file:
        file.write(b"II" + struct.pack("<HHHQ", 43, 8, 0, directory) + data)
        file.write(struct.pack("<Q", 16) * count + struct.pack("<Q", len(data)) * count)
        file.write(struct.pack("<Q", len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in tags) + bytes(8))


@pytest.mark.parametrize(
    ("side_px", "tile_px", "reason"),
    [
        (16_384, 16_384, "a tile of 16384 x 16384 px"),
        (65_536, 65_536, r"a tile of 65536 x 65536 px \(17.2 GB decoded\) exceeds the limit"),
        (100_000, 256, "px a byte, and no scan has more than 2000"),
        (5_000_000, 8192, "a side exceeds 4194304 px"),
    ],
)
def test_a_small_file_that_decodes_to_gigabytes_is_refused_at_once(
    tmp_path: Path, side_px: int, tile_px: int, reason: str
) -> None:
    path = tmp_path / "bomb.tif"
    # The tile itself need not be there in full: nothing may be read of it.
    write_repeating(path, side_px=side_px, tile_px=tile_px) if tile_px < 9000 else header_only(path, tile_px)
    start = time.monotonic()
    with pytest.raises(SlideError, match=reason):
        SlideReader(path)
    assert time.monotonic() - start < 20


def header_only(path: Path, tile_px: int) -> None:
    write_repeating(path, side_px=512, tile_px=512)
    content = path.read_bytes()
    for tag, kind in ((256, 4), (257, 4), (322, 4), (323, 4)):
        old = struct.pack("<HHQQ", tag, kind, 1, 512)
        assert old in content
        content = content.replace(old, struct.pack("<HHQQ", tag, kind, 1, tile_px))
    path.write_bytes(content)


def test_a_tile_of_another_format_has_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slide(tmp_path, IMAGE)
    monkeypatch.setattr(headers, "MAX_TILE_PX", 255 * 256)
    with pytest.raises(SlideError, match="a tile of 256 x 256 px"):
        SlideReader(tmp_path / "level_1.dcm")


def test_a_region_that_takes_too_long_fails_its_slide_and_no_other(tmp_path: Path) -> None:
    """The tile is decoded by OpenSlide itself, which nothing can interrupt."""
    noise = np.random.default_rng(0).integers(0, 8, (2048, 2048, 3), np.uint8) + np.uint8(200)
    tiff(tmp_path / "slow.tif", noise, tile=(2048, 2048), compression="zlib")
    write_pyramid(tmp_path / "good.tiff", IMAGE, mpp=0.25)
    slow = SlideReader(tmp_path / "slow.tif")
    slow._limit_s = 0.002
    for _ in range(2):  # the second without a wait: the slide is given up
        with pytest.raises(SlideError, match=r"region at .* took over 0\.002 s: .*region_limit_s"):
            slow.region(0, 0, width_px=64, height_px=64)
    slow.close()  # leaves the handle to the thread that is still in it
    with pytest.raises(SlideError, match="took over"):
        slow.overview(mpp=8.0)
    good = SlideReader(tmp_path / "good.tiff").region(0, 0, width_px=600, height_px=600)
    assert (good == IMAGE).all()
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "lemon-read")


def test_an_overview_has_a_limit_too(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "a.tiff", IMAGE, mpp=0.25)
    slide = SlideReader(tmp_path / "a.tiff")
    slide._limit_s = -1.0
    with pytest.raises(SlideError, match="its overview took over"):
        slide.overview(mpp=8.0)


def test_a_file_of_a_dicom_slide_says_what_it_is(tmp_path: Path) -> None:
    series = write_slide(tmp_path, IMAGE, levels=2)
    found = [read_instance(str(tmp_path / f"level_{index}.dcm")) for index in range(3)]
    assert [each and (each.series, each.is_volume, each.width_px) for each in found] == [
        (series, False, 256),
        (series, True, 300),
        (series, True, 600),
    ]
    write_instance(tmp_path / "ct.dcm", IMAGE, series="1.2", mpp=(1, 1), wsi=False)
    assert read_instance(str(tmp_path / "ct.dcm")) is None


def test_damaged_headers_are_told_and_never_a_traceback(tmp_path: Path) -> None:
    """200 copies of a DICOM file and 200 of a TIFF with bytes of their headers changed."""
    rng = np.random.default_rng(0)
    write_slide(tmp_path / "d", IMAGE, levels=1)
    tiff(tmp_path / "t.tif", IMAGE[:256, :256], tile=(256, 256), compression="zlib")
    sources = [(tmp_path / "d" / "level_1.dcm", 1500), (tmp_path / "t.tif", 400)]
    for source, reach in sources:
        content = source.read_bytes()[:4000]
        for number in range(200):
            changed = bytearray(content)
            for place in rng.integers(0, min(reach, len(content)), 6):
                changed[place] = int(rng.integers(0, 256))
            path = tmp_path / f"fuzz-{number}{source.suffix}"
            path.write_bytes(changed)
            read_instance(str(path))
            with contextlib.suppress(SlideError):
                check_tiff(str(path))
