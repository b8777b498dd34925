"""Slides through OpenSlide: regions at 0.25 um/px whatever the slide's levels. The only importer of openslide.

Two pixel grids: *level-0 px* are the slide's own, as OpenSlide counts them; *base px* are those of the slide resampled
to 0.25 um/px, with the same origin. Base px centre ``i`` lies at level-0 coordinate ``(i + 0.5) * scale - 0.5``.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Self, TypeVar

import cv2
import numpy as np
import openslide

from lemon.schema import CELL_MPP
from lemon.slides.errors import RegionError, SlideError
from lemon.slides.headers import check_size, check_tiff, check_tile, explain_refusal
from lemon.slides.paths import as_text, on_disk
from lemon.slides.resolution import find_resolution

LIMIT_S = 120.0
"""Longest time for a region, or for opening a slide, unless the user says otherwise."""

OVERVIEW_LIMITS = 10
"""How much longer an overview may take: of a slide without a pyramid it reads every pixel."""

_MARGIN_PX = 4  # level px read around a region, so that cubic interpolation sees true neighbours at its border

T = TypeVar("T")


class SlideReader:
    """An open slide, to be closed or used in a ``with``. Threads may read at once.

    ``width_px`` and ``height_px`` are of level 0, ``mpp`` is its um/px; ``scale`` is level-0 px a base px.

    Args:
        path: a local file that OpenSlide can open.
        default_mpp: um/px to assume where the file states none.
        mpp: um/px that outranks what the file states.
        limit_s: longest time that a region, or opening the file, may take.

    Raises:
        SlideError: the file is absent, empty, no slide, not safe to decode, or its pixels are not square; from any
            method, that a limit of time was exceeded: the slide then cannot be read any more.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        default_mpp: float = CELL_MPP,
        mpp: float | None = None,
        limit_s: float = LIMIT_S,
    ) -> None:
        self.path = on_disk(str(path))
        self._lock, self._limit_s = threading.Lock(), limit_s
        self._given_up: str | None = None
        notes = self._within_limit(lambda: _check(self.path), "its header")
        self._handle = self._within_limit(lambda: _open(self.path), "opening it")
        self._generation = 0
        properties = self._handle.properties
        resolution = find_resolution(properties, default_mpp=default_mpp, given_mpp=mpp)
        self.mpp, self.mpp_source = resolution.mpp, resolution.source
        self.notes = (*resolution.notes, *notes)
        """What there is to say of the file, for the slide's row."""
        self.scale = CELL_MPP / self.mpp
        self.width_px, self.height_px = self._handle.dimensions
        self.bounds_px = _bounds(properties, width_px=self.width_px, height_px=self.height_px)
        self.level_downsamples = tuple(self._handle.level_downsamples)
        self.level_dimensions = tuple(self._handle.level_dimensions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SlideReader({self.path!r}): {self.width_px} x {self.height_px} px at {self.mpp:g} um/px"

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
        """Release the file; one that a thread still reads from is left to it."""
        if self._given_up is None:
            self._handle.close()

    def region(self, x_base_px: int, y_base_px: int, *, width_px: int, height_px: int) -> np.ndarray:
        """Pixels at 0.25 um/px, uint8 [height_px, width_px, 3]; white where the slide has none.

        Raises RegionError when the pixels cannot be read, SlideError when that takes too long.
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

        Raises RegionError when it cannot be read, SlideError when that takes too long.
        """
        min_downsample = max(mpp / self.mpp, max(self.bounds_px[2:]) / max_px)
        level = _best_level(self.level_downsamples, min_downsample)
        downsample = self.level_downsamples[level]
        x, y, width, height = (value / downsample for value in self.bounds_px)
        size = max(1, round(self.bounds_px[2] / min_downsample)), max(1, round(self.bounds_px[3] / min_downsample))
        picture = self._strips((round(x), round(y), int(width), int(height)), level=level, size=size)
        return picture, self.bounds_px[2] * self.mpp / picture.shape[1]

    def shrunk(self, x_px: int, y_px: int, width_px: int, height_px: int, *, downsample: float) -> np.ndarray:
        """A part of level 0 at a ``downsample``-th of its size (rounded up): uint8 [H, W, 3].

        Raises RegionError when it cannot be read, SlideError when that takes too long.
        """
        level = _best_level(self.level_downsamples, downsample)
        area = (value / self.level_downsamples[level] for value in (x_px, y_px, width_px, height_px))
        x, y, width, height = (max(round(value), at) for value, at in zip(area, (0, 0, 1, 1), strict=True))
        size = math.ceil(width_px / downsample), math.ceil(height_px / downsample)
        return self._strips((x, y, width, height), level=level, size=size)

    def _strips(self, area: tuple[int, int, int, int], *, level: int, size: tuple[int, int]) -> np.ndarray:
        """An area of a level (x, y, width, height in its px) at another size: uint8 [size[1], size[0], 3].

        Strip by strip: of a slide with a single level it would not fit memory at once.
        """
        end = time.monotonic() + OVERVIEW_LIMITS * self._limit_s
        x, y, width, height = area
        rows = []
        strip_px = max(1, (32 << 20) // max(1, width))
        for top in range(0, height, strip_px):
            if time.monotonic() > end:
                raise SlideError(f"its overview took over {OVERVIEW_LIMITS * self._limit_s:g} s: {_SLOW}")
            high = min(strip_px, height - top)
            strip = self._read_level(x, y + top, level=level, width_px=max(1, width), height_px=high)
            rows_px = max(1, round((top + high) * size[1] / height) - round(top * size[1] / height))
            rows.append(cv2.resize(strip, (size[0], rows_px), interpolation=cv2.INTER_AREA))
        return np.concatenate(rows) if rows else np.full((size[1], size[0], 3), 255, np.uint8)

    def _read_level(self, x_px: int, y_px: int, *, level: int, width_px: int, height_px: int) -> np.ndarray:
        downsample = self.level_downsamples[level]
        location = round(x_px * downsample), round(y_px * downsample)
        what = f"region at {location} of level {level}"

        def read() -> np.ndarray:
            handle, generation = self._current()
            try:
                image = handle.read_region(location, level, (width_px, height_px))
            except openslide.OpenSlideError:
                # After one bad tile the handle stays in error for good (openslide #689): a fresh one, once.
                try:
                    image = self._reopened(generation).read_region(location, level, (width_px, height_px))
                except (openslide.OpenSlideError, SlideError) as error:
                    raise RegionError(f"{what}: {error}") from None
            return _on_white(np.asarray(image))

        return self._within_limit(read, what)

    def _within_limit(self, call: Callable[[], T], what: str) -> T:
        """The outcome of a call into OpenSlide; raises SlideError when it takes too long.

        Nothing interrupts a call into C. It is made in a thread, which is left behind with its handle: the slide is
        given up, and whoever waits for it goes on.
        """
        if self._given_up is not None:
            raise SlideError(self._given_up)
        outcome: Future[T] = Future()
        threading.Thread(target=_resolve_future, args=(outcome, call), daemon=True, name="lemon-read").start()
        try:
            return outcome.result(timeout=self._limit_s)
        except TimeoutError:
            if outcome.done():  # the call's own
                raise
            self._given_up = f"{what} took over {self._limit_s:g} s: {_SLOW}"
            raise SlideError(self._given_up) from None

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


_SLOW = "a damaged or hostile file, or a slow disk; region_limit_s=... allows for more"


def _resolve_future(outcome: Future[T], call: Callable[[], T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # noqa: BLE001 - raised again where the outcome is waited for
        outcome.set_exception(error)


def detect_format(path: str) -> str | None:
    """What OpenSlide takes a file for, such as ``aperio`` or ``dicom``; None where it cannot open it."""
    try:
        return openslide.OpenSlide.detect_format(path)
    except (openslide.OpenSlideError, OSError):
        return None


def _check(path: str) -> list[str]:
    """What is remarkable in a file before it is opened; raises SlideError where it must not be."""
    file = Path(path)
    if not file.exists():
        raise SlideError("file not found")
    if file.is_dir():
        raise SlideError("a folder; expected a file of a slide (of DICOM any of its files, of MIRAX the .mrxs beside)")
    if not file.is_file():
        raise SlideError("no regular file")
    if file.stat().st_size == 0:
        raise SlideError("file is empty (0 bytes)")
    return check_tiff(path)


def _open(path: str) -> openslide.OpenSlide:
    try:
        handle = openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError:
        raise SlideError(f"not a slide that OpenSlide can open: {explain_refusal(path)}") from None
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(f"cannot be opened ({as_text(str(error))}): {explain_refusal(path)}") from None
    check_size(*handle.dimensions)
    for level in range(handle.level_count):  # formats that are no TIFF have tiles too
        sides = (handle.properties.get(f"openslide.level[{level}].tile-{side}", "0") for side in ("width", "height"))
        check_tile(*(int(side) for side in sides))
    return handle


def _bounds(properties: Mapping[str, str], *, width_px: int, height_px: int) -> tuple[int, int, int, int]:
    """x, y, width, height of the scanned area in level-0 px: the whole slide where the file states none."""
    names = ("x", "y", "width", "height")
    try:
        x, y, width, height = (int(properties[f"openslide.bounds-{name}"]) for name in names)
    except (KeyError, ValueError):
        return 0, 0, width_px, height_px
    left, top = max(0, x), max(0, y)
    wide, high = min(x + width, width_px) - left, min(y + height, height_px) - top
    return (left, top, wide, high) if wide > 0 and high > 0 else (0, 0, width_px, height_px)


def _best_level(downsamples: tuple[float, ...], max_downsample: float) -> int:
    """The coarsest level that is not coarser than wanted (within 1 %), else level 0."""
    fine = [level for level, downsample in enumerate(downsamples) if downsample <= max_downsample * 1.01]
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
