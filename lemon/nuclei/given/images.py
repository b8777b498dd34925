"""Nuclei in label images: TIFF, npy, npz, zarr, and the .mat files of HoVer-Net and of its training sets.

A label image has a number a nucleus and 0 elsewhere. It is gone through window by window, so that one of a whole slide
fits: a label is taken in the window that holds its first row and column, and reaches over it by up to a margin.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from scipy import io, ndimage

from lemon.nuclei.given.documents import stardist_nuclei
from lemon.nuclei.given.nuclei import GivenError, GivenNuclei, gathered
from lemon.nuclei.pieces import outer_contour
from lemon.slides.reader import SlideReader

WINDOW_PX = 4096
MARGIN_PX = 512
"""Longest side of a nucleus in a label image."""

_DIRECT = 1 << 23
"""Labels up to here are looked up as they are; larger ones are numbered anew."""


def read_labels(path: Path, reader: SlideReader) -> GivenNuclei:
    """The nuclei of a label image; ids are its numbers. Raises GivenError."""
    if path.suffix == ".npz":
        return _archive(path, reader)
    if path.suffix == ".mat":
        return _matlab(path, reader)
    read = {".npy": _npy, ".zarr": _zarr}.get(path.suffix, _tiff)
    return outlines_of(read(path), reader)


def outlines_of(labels: Any, reader: SlideReader, classes: dict[int, str] | None = None) -> GivenNuclei:
    """Outer contours of the labels of an array [H, W], or anything that gives one by slices. Raises GivenError."""
    shape, dtype = tuple(labels.shape), np.dtype(labels.dtype)
    if len(shape) != 2 or not np.issubdtype(dtype, np.integer):
        raise GivenError(f"got an array {list(shape)} of {dtype}; expected labels, integers [H, W]")
    scale, unit = _scale_of(shape, reader)
    found: dict[int, np.ndarray] = {}
    n_cut = 0
    for y in range(0, shape[0], WINDOW_PX):
        for x in range(0, shape[1], WINDOW_PX):
            top, left = max(0, y - 1), max(0, x - 1)
            window = np.asarray(labels[top : y + WINDOW_PX + MARGIN_PX, left : x + WINDOW_PX + MARGIN_PX])
            for number, box in _boxes(window, first=(y - top, x - left)):
                if number in found:
                    raise GivenError(f"label {number} lies in places far apart; expected a number for each nucleus")
                cell = np.ascontiguousarray(window[box] == number)
                n_cut += max(cell.shape) > MARGIN_PX
                contour = outer_contour(cell, x0_px=left + box[1].start, y0_px=top + box[0].start)
                found[number] = contour[:, 0]
    if n_cut > len(found) / 2:
        raise GivenError(f"most labels span over {MARGIN_PX} px; expected a number for each nucleus, not each class")
    outlines = [*found.values()] or [np.empty((0, 2))]
    return gathered(
        np.concatenate(outlines),
        [len(outline) for outline in found.values()],
        ids=[str(number) for number in found],
        classes=None if classes is None else [classes.get(number) for number in found],
        unit=unit,
        scale=scale,
        centred=True,
        notes=(f"{n_cut} labels span over {MARGIN_PX} px",) if n_cut else (),
    )


def _boxes(window: np.ndarray, *, first: tuple[int, int]) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Number and box of each label that begins in a window's core.

    The core begins at ``first``: 1 where there is a row or column before it, which a label that began earlier touches.
    """
    if not window.size or not window.any():
        return
    numbers = None
    if window.min() < 0 or window.max() > _DIRECT:
        numbers, inverse = np.unique(window, return_inverse=True)
        window = inverse.reshape(window.shape) * (window > 0)
    for index, box in enumerate(ndimage.find_objects(window.astype(np.int32)), start=1):
        if box is None:
            continue
        starts = box[0].start, box[1].start
        if all(low <= start < low + WINDOW_PX for start, low in zip(starts, first, strict=True)):
            yield (index if numbers is None else int(numbers[index])), box


def _scale_of(shape: tuple[int, ...], reader: SlideReader) -> tuple[float, str]:
    """Level-0 px a px of a label image that has the size of one of the slide's levels, or of all at 0.25 um/px."""
    for level, (size, downsample) in enumerate(zip(reader.level_dimensions, reader.level_downsamples, strict=True)):
        if size == shape[::-1]:
            return downsample, f"px of level {level}"
    sides = reader.width_px / shape[1], reader.height_px / shape[0]
    if abs(sides[0] / sides[1] - 1) > 0.005:
        sizes = ", ".join(f"{wide} x {high}" for wide, high in reader.level_dimensions)
        raise GivenError(
            f"an image of {shape[1]} x {shape[0]} px, of another shape than the slide, whose levels are {sizes}; "
            "expected labels of the whole slide"
        )
    return sides[0], f"px of the whole slide at {reader.mpp * sides[0]:.4g} um/px"


# --- files ------------------------------------------------------------------------------------------------------------


def _tiff(path: Path) -> np.ndarray:
    """The finest level, decoded into a file that is mapped into memory. OME-TIFF's axes of length one are left out."""
    try:
        with tifffile.TiffFile(path) as file:
            return np.squeeze(file.series[0].levels[0].asarray(out="memmap"))
    except (tifffile.TiffFileError, ValueError, OSError, IndexError) as error:
        raise GivenError(f"cannot be read as a TIFF: {' '.join(str(error).split())}") from None


def _npy(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise GivenError(f"cannot be read as an array: {error}") from None
    return np.asarray(loaded)[0] if loaded.ndim == 3 and loaded.shape[0] == 1 else loaded


def _zarr(path: Path) -> Any:
    """A zarr array, or the finest level of an OME-Zarr image (the array ``0`` of its group)."""
    try:
        import zarr
    except ImportError:
        raise GivenError("zarr is not installed; expected pip install 'lemon-nuclei[spatialdata]' first") from None
    try:
        node: Any = zarr.open(path, mode="r")
        node = node if hasattr(node, "shape") else node["0"]
    except Exception as error:  # noqa: BLE001 - zarr's stores and codecs raise what they like
        raise GivenError(f"no zarr array, and no group with an array '0': {error}") from None
    return node if len(node.shape) == 2 else np.squeeze(node[...])


def _archive(path: Path, reader: SlideReader) -> GivenNuclei:
    """An .npz: StarDist's details, or the label image that is in it (``inst_map`` or the only array)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "coord" in arrays:
                return stardist_nuclei({name: arrays[name] for name in ("coord", "prob", "class_id") if name in arrays})
            names = [name for name in ("inst_map", "labels") if name in arrays] or list(arrays)
            labels = arrays[names[0]] if len(arrays) == 1 or names != list(arrays) else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise GivenError(f"cannot be read as arrays: {error}") from None
    if labels is None:
        raise GivenError(f"holds {', '.join(names)}; expected inst_map, labels or StarDist's coord")
    return outlines_of(labels, reader)


def _matlab(path: Path, reader: SlideReader) -> GivenNuclei:
    """HoVer-Net's ``mat/``: inst_map and, where it tells classes, inst_type of each inst_uid; or type_map beside it.

    In the files of training sets (CoNSeP) inst_type is in the order of the labels, without inst_uid.
    """
    try:
        arrays = io.loadmat(path)
    except NotImplementedError:  # MATLAB 7.3 is HDF5
        raise GivenError("is of MATLAB 7.3; expected scipy's or MATLAB's version 5: save it with -v7") from None
    except (io.matlab.MatReadError, ValueError, OSError, TypeError, EOFError) as error:
        raise GivenError(f"cannot be read as MATLAB's: {error}") from None
    if "inst_map" not in arrays:
        names = ", ".join(name for name in arrays if not name.startswith("__")) or "nothing"
        raise GivenError(f"holds {names}; expected inst_map, as HoVer-Net writes it")
    labels = arrays["inst_map"]
    labels = labels.astype(np.int32) if np.issubdtype(labels.dtype, np.floating) else labels
    classes = None
    if "inst_type" in arrays:
        types = arrays["inst_type"].ravel()
        numbers = arrays["inst_uid"].ravel() if "inst_uid" in arrays else np.unique(labels[labels > 0])
        if len(numbers) != len(types):
            raise GivenError(f"{len(types)} inst_type for {len(numbers)} nuclei; expected one a nucleus")
        classes = {int(number): str(int(kind)) for number, kind in zip(numbers, types, strict=True) if kind}
    return outlines_of(labels, reader, classes)
