"""Slides through OpenSlide: regions at 0.25 um/px whatever the slide's levels. The only importer of openslide.

Two pixel grids: *level-0 px* are the slide's own, as OpenSlide counts them; *base px* are those of the slide resampled
to 0.25 um/px, with the same origin. Base px centre ``i`` lies at level-0 coordinate ``(i + 0.5) * scale - 0.5``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import openslide

from lemon.schema import CROP_MPP

PLAUSIBLE_MPP = (0.05, 20.0)
"""um/px outside this range is a writer's mistake and is treated as missing."""

_MARGIN_PX = 4  # level px read around a region, so that cubic interpolation sees true neighbours at its border


class SlideError(Exception):
    """A slide cannot be used; the message is the reason that its row in the ledger gives."""


class RegionError(Exception):
    """One region cannot be read, also after the slide was opened anew."""


class SlideReader:
    """An open slide. Threads may read at once.

    Args:
        path: a local file that OpenSlide can open.
        default_mpp: um/px to assume where the file states none.

    Raises:
        SlideError: the file is absent, empty, or no slide.
    """

    def __init__(self, path: str | Path, *, default_mpp: float = CROP_MPP) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._handle = _open(self.path)
        self._generation = 0
        properties = self._handle.properties
        self.mpp, self.mpp_source = _resolution(properties, default_mpp=default_mpp)
        self.scale = CROP_MPP / self.mpp
        self.width_px, self.height_px = self._handle.dimensions
        self.bounds_px = _bounds(properties, width_px=self.width_px, height_px=self.height_px)
        self.level_downsamples = tuple(self._handle.level_downsamples)
        self.level_dimensions = tuple(self._handle.level_dimensions)

    @property
    def mpp_assumed(self) -> bool:
        """Whether the file states no resolution, so that the configured default stands in."""
        return self.mpp_source == "assumed"

    @property
    def bounds_base_px(self) -> tuple[int, int, int, int]:
        """x, y, width, height of the scanned area, in base px."""
        x, y, width, height = (value / self.scale for value in self.bounds_px)
        return math.floor(x), math.floor(y), math.ceil(width), math.ceil(height)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()

    def region(self, x_base_px: int, y_base_px: int, *, width_px: int, height_px: int) -> np.ndarray:
        """Pixels at 0.25 um/px, uint8 [height_px, width_px, 3]; white where the slide has none.

        Raises RegionError when the pixels cannot be read.
        """
        level = _best_level(self.level_downsamples, self.scale)
        step = self.scale / self.level_downsamples[level]  # level px a base px
        # Coordinates of the first and last wanted base px, in px of the level.
        left, top = (x_base_px + 0.5) * step - 0.5, (y_base_px + 0.5) * step - 0.5
        reach = _MARGIN_PX + math.ceil(step)
        x0, y0 = math.floor(left) - reach, math.floor(top) - reach
        x1 = math.ceil(left + (width_px - 1) * step) + reach + 1
        y1 = math.ceil(top + (height_px - 1) * step) + reach + 1
        pixels = self._read_level(x0, y0, level=level, width_px=x1 - x0, height_px=y1 - y0)
        if step == 1.0:
            x, y = round(left) - x0, round(top) - y0
            return np.ascontiguousarray(pixels[y : y + height_px, x : x + width_px])
        return _resample(pixels, left=left - x0, top=top - y0, step=step, width_px=width_px, height_px=height_px)

    def overview(self, *, mpp: float, max_px: int = 4096) -> tuple[np.ndarray, float]:
        """The scanned area at about ``mpp`` um/px: uint8 [H, W, 3] and the true um/px of the picture.

        Raises RegionError when it cannot be read.
        """
        wanted = max(mpp / self.mpp, max(self.bounds_px[2:]) / max_px)
        level = _best_level(self.level_downsamples, wanted)
        downsample = self.level_downsamples[level]
        x, y, width, height = (value / downsample for value in self.bounds_px)
        size = max(1, round(self.bounds_px[2] / wanted)), max(1, round(self.bounds_px[3] / wanted))
        rows = []  # strip by strip: a slide with a single level would not fit memory at once
        strip_px = max(1, (32 << 20) // max(1, int(width)))
        for top in range(0, int(height), strip_px):
            high = min(strip_px, int(height) - top)
            strip = self._read_level(round(x), round(y) + top, level=level, width_px=max(1, int(width)), height_px=high)
            rows_px = max(1, round((top + high) * size[1] / int(height)) - round(top * size[1] / int(height)))
            rows.append(cv2.resize(strip, (size[0], rows_px), interpolation=cv2.INTER_AREA))
        picture = np.concatenate(rows) if rows else np.full((size[1], size[0], 3), 255, np.uint8)
        return picture, self.bounds_px[2] * self.mpp / picture.shape[1]

    def _read_level(self, x_px: int, y_px: int, *, level: int, width_px: int, height_px: int) -> np.ndarray:
        downsample = self.level_downsamples[level]
        location = round(x_px * downsample), round(y_px * downsample)
        handle, generation = self._current()
        try:
            image = handle.read_region(location, level, (width_px, height_px))
        except openslide.OpenSlideError:
            # After one bad tile the handle stays in error for good (openslide #689): a fresh one, once.
            try:
                image = self._reopened(generation).read_region(location, level, (width_px, height_px))
            except (openslide.OpenSlideError, SlideError) as error:
                raise RegionError(f"region at {location} of level {level}: {error}") from None
        return _on_white(np.asarray(image))

    def _current(self) -> tuple[openslide.OpenSlide, int]:
        with self._lock:
            return self._handle, self._generation

    def _reopened(self, generation: int) -> openslide.OpenSlide:
        with self._lock:
            if self._generation == generation:  # not already reopened by another thread
                # The old handle is left to the garbage collector: other threads may still be reading from it.
                self._handle = _open(self.path)
                self._generation += 1
            return self._handle


def _open(path: str) -> openslide.OpenSlide:
    file = Path(path)
    if not file.exists():
        raise SlideError("file not found")
    if file.is_file() and file.stat().st_size == 0:
        raise SlideError("file is empty (0 bytes)")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError("not a slide that OpenSlide can open (truncated, or another kind of file)") from None
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(f"cannot be opened: {error}") from None


def _resolution(properties: Mapping[str, str], *, default_mpp: float) -> tuple[float, str]:
    """um/px and where it comes from: ``file``, ``magnification``, ``tiff`` or ``assumed``."""
    x, y = (_number(properties.get(name)) for name in ("openslide.mpp-x", "openslide.mpp-y"))
    if x and y and all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in (x, y)):
        return (x + y) / 2, "file"
    power = _number(properties.get("openslide.objective-power")) or _number(properties.get("aperio.AppMag"))
    if power and PLAUSIBLE_MPP[0] <= 10 / power <= PLAUSIBLE_MPP[1]:
        return 10 / power, "magnification"  # 40x is 0.25 um/px, 20x is 0.5
    resolution = _number(properties.get("tiff.XResolution"))
    unit_um = {"centimeter": 1e4, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", ""))
    # Editors write 72, 96 or 300 dots an inch into any picture: those are no microscope's.
    if resolution and unit_um and PLAUSIBLE_MPP[0] <= unit_um / resolution <= PLAUSIBLE_MPP[1]:
        return unit_um / resolution, "tiff"
    return default_mpp, "assumed"


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value and math.isfinite(value) and value > 0 else None


def _bounds(properties: Mapping[str, str], *, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """x, y, width, height of the scanned area in level-0 px: the whole slide where the file states none."""
    names = ("x", "y", "width", "height")
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in names)
    except (KeyError, ValueError):
        return 0, 0, width_px, height_px
    return x, y, width, height


def _best_level(downsamples: tuple[float, ...], wanted: float) -> int:
    """The coarsest level that is not coarser than wanted (within 1 %), else level 0."""
    fine = [level for level, downsample in enumerate(downsamples) if downsample <= wanted * 1.01]
    return max(fine, key=lambda level: downsamples[level]) if fine else 0


def _on_white(rgba: np.ndarray) -> np.ndarray:
    """RGBA uint8 [H, W, 4] over a white ground, uint8 [H, W, 3]."""
    alpha = rgba[..., 3]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha[..., None].astype(np.uint16)
    return ((rgba[..., :3] * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)


def _resample(pixels: np.ndarray, *, left: float, top: float, step: float, width_px: int, height_px: int) -> np.ndarray:
    """Cubic resampling at ``left + i * step``; a Gaussian against aliasing first when it shrinks."""
    if step > 1.05:
        # Standard deviation that makes a Gaussian of 0.5 px of the source one of 0.5 px of the target.
        pixels = cv2.GaussianBlur(pixels, (0, 0), 0.5 * math.sqrt(step**2 - 1))
    transform = np.array([[step, 0, left], [0, step, top]], np.float64)
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        pixels, transform, (width_px, height_px), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=(255,) * 3
    )
