"""Images as people save them are uint8 RGB of the same look, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from lemon.slides import images
from lemon.slides.images import ImageError, read_image, read_mask_image

RGB = np.random.default_rng(0).integers(0, 256, (64, 70, 3), dtype=np.uint8)
RGB[0, 0] = 255
DEEP = RGB.astype(np.uint16) * 257
ALPHA = np.full(RGB.shape[:2], 255, np.uint8)
GREY = np.repeat(RGB[..., :1], 3, axis=2)


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(RGB).save(path, exif=exif)


def half_transparent(path: Path) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA // 2 + 1])).save(path)


def animated(path: Path) -> None:
    Image.fromarray(RGB).save(path, save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())])


def pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(RGB, photometric="rgb")
        writer.write(RGB[::2, ::2], photometric="rgb", subfiletype=1)


def cv2_write(image: np.ndarray) -> Any:
    return lambda path: cv2.imwrite(str(path), image)


def tiff_write(image: np.ndarray, **options: Any) -> Any:
    return lambda path: tifffile.imwrite(path, image, **options)


def pil_write(image: Image.Image, **options: Any) -> Any:
    return lambda path: image.save(path, **options)


def part_of(suffix: str, write: Any, share: float = 0.6) -> Any:
    def make(path: Path) -> None:
        write(path.with_name(f"whole{suffix}"))
        content = path.with_name(f"whole{suffix}").read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


SAME_LOOK = {
    "8 bit.png": (pil_write(Image.fromarray(RGB)), RGB),
    "opaque.png": (pil_write(Image.fromarray(np.dstack([RGB, ALPHA]))), RGB),
    "grey.png": (pil_write(Image.fromarray(RGB[..., 0])), GREY),
    "16 bit.png": (cv2_write(DEEP[..., ::-1]), RGB),
    "16 bit grey.png": (cv2_write(DEEP[..., 0]), GREY),
    "16 bit opaque.png": (cv2_write(np.dstack([DEEP[..., ::-1], ALPHA.astype(np.uint16) * 257])), RGB),
    "16 bit.tif": (tiff_write(DEEP, photometric="rgb"), RGB),
    "16 bit grey.tif": (tiff_write(DEEP[..., 0], byteorder=">"), GREY),
    "16 bit lzw.tif": (cv2_write(DEEP[..., ::-1]), RGB),
    "16 bit.ppm": (lambda path: path.write_bytes(b"P6 70 64 65535\n" + DEEP.astype(">u2").tobytes()), RGB),
    "planes.tif": (tiff_write(RGB.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"), RGB),
    "turned.png": (turned, np.rot90(RGB, -1)),
    "turned.tif": (pil_write(Image.fromarray(RGB), tiffinfo={274: 6}), np.rot90(RGB, -1)),
    "pyramid.tif": (pyramid, RGB),
    "lossless.webp": (pil_write(Image.fromarray(RGB), lossless=True), RGB),
    "palette.png": (
        pil_write(Image.fromarray(RGB).quantize(16)),
        np.asarray(Image.fromarray(RGB).quantize(16).convert("RGB")),
    ),
}


@pytest.mark.parametrize("name", SAME_LOOK)
def test_an_image_however_it_is_saved_has_the_same_look(tmp_path: Path, name: str) -> None:
    write, expected = SAME_LOOK[name]
    write(tmp_path / name)
    found = read_image(tmp_path / name)
    assert (found.dtype, found.flags.writeable) == (np.uint8, True)
    np.testing.assert_array_equal(found, expected)


def test_alpha_is_set_on_white(tmp_path: Path) -> None:
    half_transparent(tmp_path / "a.png")
    expected = (RGB.astype(int) * 128 + 255 * 127) / 255
    assert np.abs(read_image(tmp_path / "a.png") - expected).max() <= 0.51


REFUSED = {
    "12 bit.png": (cv2_write(DEEP[..., ::-1] >> 4), "16-bit with values of 0 to 4,095, so what is white"),
    "8 in 16 bit.png": (cv2_write(RGB.astype(np.uint16)), "16-bit with values of 0 to 255"),
    "planes 16 bit.tif": (
        tiff_write(DEEP.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        "in an order that is not read right",
    ),
    "white is 0.tif": (tiff_write(DEEP[..., 0], photometric="miniswhite"), "in an order that is not read right"),
    "float.tif": (tiff_write((RGB[..., 0] / 255).astype(np.float32)), "float; expected 8-bit RGB"),
    "float rgb.tif": (tiff_write((RGB / 255).astype(np.float32), photometric="rgb"), "expected an 8-bit"),
    "32 bit.tif": (tiff_write(RGB[..., 0].astype(np.uint32)), "32-bit"),
    "signed.tif": (tiff_write(RGB[..., 0].astype(np.int16)), "16-bit, signed"),
    "five channels.tif": (tiff_write(np.zeros((5, 64, 64), np.uint8), planarconfig="separate"), "expected"),
    "cmyk.jpg": (pil_write(Image.fromarray(RGB).convert("CMYK")), "colours are CMYK; expected RGB"),
    "lab.tif": (pil_write(Image.fromarray(RGB).convert("LAB")), "colours are LAB"),
    "transparent.png": (pil_write(Image.fromarray(np.dstack([RGB, ALPHA * 0]))), "wholly transparent"),
    "animated.gif": (animated, "2 pages; expected a single image"),
    "animated.png": (animated, "2 pages"),
    "stack.tif": (tiff_write(np.stack([RGB] * 3), photometric="rgb"), "3 pages"),
    "part.png": (part_of(".png", pil_write(Image.fromarray(RGB))), "truncated"),
    "part.jpg": (part_of(".jpg", pil_write(Image.fromarray(RGB))), "truncated"),
    "part of 16 bit.png": (part_of(".png", cv2_write(DEEP)), "truncated"),
    "part of 16 bit.tif": (part_of(".tif", tiff_write(DEEP, photometric="rgb")), "expected"),
    "part of 16 bit lzw.tif": (part_of(".tif", cv2_write(DEEP)), "expected"),
    # Made when its turn comes: Pillow holds a byte a pixel.
    "bomb.png": (
        lambda path: pil_write(Image.new("1", (20_000, 20_000)))(path),
        "too large; expected 150,000,000 px at most",
    ),
    "junk.png": (lambda path: path.write_bytes(b"\x89PNG junk"), "no image that can be read"),
    "empty.png": (lambda path: path.touch(), "no image that can be read"),
    "folder.png": (lambda path: path.mkdir(), "a folder"),
    "absent.png": (lambda path: None, "no such image"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("error")
def test_what_has_no_certain_look_is_one_line(tmp_path: Path, name: str) -> None:
    write, part = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / name)
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_tiff_of_tiny_size_and_a_huge_tile_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", tile=(64, 128))
    assert np.array_equal(read_image(tmp_path / "a.tif"), RGB)
    monkeypatch.setattr(images, "MAX_TILE_PX", 64 * 64)
    with pytest.raises(ImageError, match="tiles of 8,192 px; expected 4,096 at most"):
        read_image(tmp_path / "a.tif")


def test_the_error_is_the_callers(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no such image"):
        read_image(tmp_path / "absent.png", error=KeyError)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_a_mask_is_what_is_not_black_at_any_depth(tmp_path: Path, dtype: type[np.generic]) -> None:
    mask = RGB[..., 0] > 128
    tifffile.imwrite(tmp_path / "m.tif", mask.astype(dtype))
    np.testing.assert_array_equal(read_mask_image(tmp_path / "m.tif"), mask)


def test_what_is_transparent_is_outside_a_mask(tmp_path: Path) -> None:
    inside = RGB[..., 0] > 128
    Image.fromarray(np.dstack([np.full_like(RGB, 200), inside * ALPHA])).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask_image(tmp_path / "m.png"), inside)


def test_a_mask_with_nan_is_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "m.tif", np.full((8, 8), np.nan, np.float32))
    with pytest.raises(ImageError, match="holds NaN"):
        read_mask_image(tmp_path / "m.tif")
