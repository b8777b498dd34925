"""The one reader of images that users give, other than slides: crops, fields, masks, figures.

``read_image`` gives uint8 RGB or refuses in one line. What it does with what is not 8-bit RGB:

- grey, two colours, a palette: RGB of the same look; alpha: set on white; EXIF's rotation: turned as viewers turn it;
- 16-bit: 65,535 is white where a value is above 16,383. Below that 12 and 14 bits in 16 look alike, so it is refused;
- refused: float, signed or more than 16 bits, CMYK, Lab and HSV, wholly transparent, animated or a stack of pages (of a
  TIFF, smaller pages behind the first are its overviews), truncated, and more than ``MAX_PX``.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from lemon.runtime.store import locate
from lemon.slides.headers import MAX_TILE_PX

MAX_PX = 150_000_000
"""Pixels of an image that are read at most: as RGB 450 MB."""

_SURE_16_BIT = 1 << 14

_COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
_DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")

# What Pillow's decoders raise on damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


class ImageError(ValueError):
    """An image cannot be used; one line: which, what was found, what was expected."""


class _UnusableError(Exception):
    """Why an image is refused; what comes behind its path."""


def read_image(path: str | Path, *, error: type[Exception] = ImageError) -> np.ndarray:
    """An image file, local or at s3://, as uint8 RGB [H, W, 3]. Raises ``error`` in one line."""
    try:
        return _as_rgb(_decoded(path))
    except _UnusableError as refused:
        raise error(f"{path}: {refused}") from None


def read_mask_image(path: str | Path, *, error: type[Exception] = ImageError) -> np.ndarray:
    """Where an image is not black: bool [H, W], of any depth; transparent pixels count as black.

    Raises ``error`` in one line.
    """
    try:
        image = _decoded(path, deep_is_fine=True)
    except _UnusableError as refused:
        raise error(f"{path}: {refused}") from None
    colours = image[..., :3] if image.shape[2] > 2 else image[..., :1]
    shown = image[..., -1] > 0 if image.shape[2] in (2, 4) else np.ones(image.shape[:2], bool)
    return np.any(colours, axis=2) & shown


def _decoded(path: str | Path, *, deep_is_fine: bool = False) -> np.ndarray:
    """Grey, RGB, or either with alpha: uint8 [H, W, 1 to 4], or uint16 and others where ``deep_is_fine``."""
    content = _content(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of damaged EXIF data, and a limit of pixels below ours
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                _check_size(image)
                _check_pages(image)
                depth = _depth(image, content)
                if depth != "8-bit":
                    return _deep(image, content, depth, as_is=deep_is_fine)
                image.load()
                return _plain(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise _UnusableError("no image that can be read; expected an 8-bit PNG, JPEG or TIFF: convert it") from None
    except Image.DecompressionBombError:
        raise _UnusableError(f"too large; expected {MAX_PX:,} px at most: cut it, or take it for a slide") from None
    except _DAMAGED as damage:
        why = " ".join(str(damage).split()) or type(damage).__name__
        raise _UnusableError(f"cannot be read ({why}); expected a whole image: download or save it again") from None


def _content(path: str | Path) -> bytes:
    try:
        store, name = locate(path)
        if store.is_local and Path(store.path(name)).is_dir():
            raise _UnusableError("a folder; expected an image file")
        return store.read_bytes(name)
    except FileNotFoundError:
        raise _UnusableError("no such image; expected every image that is named: download it again") from None
    except (OSError, ValueError) as error:
        raise _UnusableError(f"cannot be read: {' '.join(str(error).split())}") from None


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PX:
        raise _UnusableError(f"{width}x{height} px; expected {MAX_PX:,} px at most: cut it, or take it for a slide")
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(TiffImagePlugin.TILEWIDTH, 0)) * int(tags.get(TiffImagePlugin.TILELENGTH, 0))
    if tile > MAX_TILE_PX:
        raise _UnusableError(f"tiles of {tile:,} px; expected {MAX_TILE_PX:,} at most: save it again")


def _check_pages(image: Image.Image) -> None:
    """Refuse an animation or a stack; pages behind the first that are smaller are overviews of it."""
    n_pages = getattr(image, "n_frames", 1)
    if n_pages == 1 or image.format == "MPO":  # a camera's JPEG with a preview
        return
    first = image.size
    if image.format == "TIFF":
        smaller = []
        for page in range(1, n_pages):
            image.seek(page)
            smaller.append(image.size[0] < first[0] and image.size[1] < first[1])
        image.seek(0)
        if all(smaller):
            return
    raise _UnusableError(f"{n_pages} pages; expected a single image: save the one that is meant")


def _depth(image: Image.Image, content: bytes) -> str:
    """8-bit, 16-bit, or the name of what is refused. Pillow's modes hide 16 bits of colour, so headers tell."""
    if image.mode == "F":
        return "float"
    if image.format == "PNG" and content[24] == 16:
        return "16-bit"
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        bits, formats = max(tags.get(258, (1,))), set(tags.get(339, (1,)))
        if formats & {3, 6}:
            return "float"
        if bits > 8:
            return f"{bits}-bit" if formats == {1} else f"{bits}-bit, signed"
    if image.mode in _DEEP:
        return "16-bit"
    return "8-bit"


def _plain(image: Image.Image) -> np.ndarray:
    """An 8-bit image [H, W, 1 to 4]."""
    if image.mode not in _COLOURS:
        raise _UnusableError(f"colours are {image.mode}; expected RGB: save it as 8-bit RGB")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        return np.array(image.convert("LA" if grey else "RGBA"))
    array = np.array(image.convert("L" if grey else "RGB"))
    return array[..., None] if array.ndim == 2 else array


def _deep(image: Image.Image, content: bytes, depth: str, *, as_is: bool) -> np.ndarray:
    """An image of more than 8 bits, as 8 bits by the rule of the module's head, or ``as_is``."""
    if depth != "16-bit" and not as_is:
        raise _UnusableError(f"{depth}; expected 8-bit RGB: save it with the range that is meant")
    if image.getexif().get(274, 1) != 1:
        raise _UnusableError("16-bit and turned by its EXIF data; expected it upright: save it as 8-bit RGB")
    tags = getattr(image, "tag_v2", {})
    if tags.get(262, 1) not in (1, 2) or tags.get(284, 1) != 1:  # white is 0, or colour after colour
        raise _UnusableError(f"{depth} in an order that is not read right; expected 8-bit RGB: save it so")
    image.load()  # OpenCV gives what it could read of a truncated file
    array = np.asarray(image) if image.mode in _DEEP else cv2.imdecode(np.frombuffer(content, np.uint8), -1)
    if array is None or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        raise _UnusableError(f"{depth} and cannot be decoded, or holds NaN; expected 8-bit RGB: save it so")
    array = array[..., None] if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]
    if as_is:
        return array
    top, low = int(array.max(initial=0)), int(array.min(initial=0))
    if top < _SURE_16_BIT or top > 65_535 or low < 0:
        got = f"16-bit with values of {low:,} to {top:,}"
        raise _UnusableError(f"{got}, so what is white cannot be told; expected 8-bit RGB: save it so")
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _as_rgb(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of grey or RGB [H, W, 1 to 4], alpha set on white."""
    colours = image[..., :3] if image.shape[2] > 2 else np.repeat(image[..., :1], 3, axis=2)
    if image.shape[2] in (1, 3):
        return np.ascontiguousarray(colours)
    alpha = image[..., -1:].astype(np.uint16)
    if not alpha.any():
        raise _UnusableError("wholly transparent; expected a picture: save it without alpha")
    return ((colours * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
