"""Crops of labelled nuclei: 60x60 px at 0.25 um/px, centred, out of a field or a ready-made patch of any resolution.

Border policy, for every task: a nucleus is left out where its 60 px crop reaches over the edge of the image, and the
counts say how many were. Nothing is filled in: a white or black margin would tell a probe where a field ends, and
views that turn need all 60 px. The rule is the paper's too: applied to the NuCLS tables it leaves the class counts of
the paper's Table 3 within a few per cent, where keeping border nuclei gives a third more. Ready-made patches that their
authors cut at an edge show it as a black margin: they fall under the same rule. The single exception is in
``folder.py``, for crops of a user that are smaller than 60 px altogether.

A field that is not at 0.25 um/px is resampled as a whole, on the same grid as slides are (``lemon.slides.reader``):
cubic, after a Gaussian where it shrinks. Crops are then whole px of it, so a nucleus is centred within half a px.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from lemon.cells.crop import corners_of, cut_crops
from lemon.probe.task import TaskError
from lemon.schema import CELL_MPP, CELL_PX
from lemon.slides.images import read_image

_BLACK = 2  # values up to this are a filled margin: lossy patches do not keep 0 exactly


def cut_cells(image: np.ndarray, centre_px: np.ndarray, *, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Crops around points of an image; the border policy decides which.

    Args:
        image: uint8 [H, W, 3] RGB at ``mpp`` um/px.
        centre_px: float [N, 2], x and y in px of the image; the centre of the first px is 0.

    Returns:
        Crops uint8 [K, 60, 60, 3] at 0.25 um/px, and which of the N points they are of: bool [N].
    """
    field = to_crop_mpp(image, mpp=mpp)
    corner = corners(centre_px, mpp=mpp)
    kept = is_whole(corner, width_px=field.shape[1], height_px=field.shape[0])
    return cut_crops(field, corner[kept]), kept


def cut_by_image(
    names: np.ndarray, centre_px: np.ndarray, read: Callable[[str], tuple[np.ndarray, float]], *, desc: str
) -> tuple[np.ndarray, np.ndarray]:
    """Crops around points of several images, one image in memory at a time.

    Args:
        names: str [N], the image that each point is of.
        centre_px: float [N, 2], in px of it.
        read: gives an image, uint8 [H, W, 3], and its um/px by name.
        desc: what the progress bar says.

    Returns:
        Crops uint8 [K, 60, 60, 3] in the order of the points, and which of the N points they are of: bool [N].
    """
    images = np.empty((len(names), CELL_PX, CELL_PX, 3), np.uint8)
    kept = np.zeros(len(names), bool)
    unique, owner = np.unique(names, return_inverse=True)
    for number, name in enumerate(tqdm(unique, unit="image", desc=desc, disable=None)):
        indices = np.flatnonzero(owner == number)
        image, mpp = read(str(name))
        crops, fits = cut_cells(image, centre_px[indices], mpp=mpp)
        images[indices[fits]], kept[indices] = crops, fits
    return images[kept], kept


def corners(centre_px: np.ndarray, *, mpp: float) -> np.ndarray:
    """Top left px of the crops, int [N, 2], on the grid of 0.25 um/px, of centres [N, 2] in px of ``mpp`` um/px."""
    centre = (np.asarray(centre_px, np.float64).reshape(-1, 2) + 0.5) * (mpp / CELL_MPP) - 0.5
    return corners_of(centre)


def is_whole(corner_px: np.ndarray, *, width_px: int, height_px: int) -> np.ndarray:
    """Which crops of top left px [N, 2] lie wholly inside: bool [N]."""
    return np.all((corner_px >= 0) & (corner_px + CELL_PX <= (width_px, height_px)), axis=1)


def size_at_crop_mpp(width_px: int, height_px: int, *, mpp: float) -> tuple[int, int]:
    """Whole px at 0.25 um/px that an image of ``mpp`` um/px fills: width, height."""
    scale = mpp / CELL_MPP
    return math.floor(width_px * scale + 1e-6), math.floor(height_px * scale + 1e-6)


def to_crop_mpp(image: np.ndarray, *, mpp: float) -> np.ndarray:
    """An image uint8 [H, W, 3] of ``mpp`` um/px at 0.25 um/px; itself where it has that already."""
    step = CELL_MPP / mpp  # px of the image a px of the result
    if abs(step - 1) < 1e-3:
        return image
    if step > 1.05:
        # Standard deviation that makes a Gaussian of 0.5 px of the source one of 0.5 px of the result.
        image = cv2.GaussianBlur(image, (0, 0), 0.5 * math.sqrt(step**2 - 1))
    offset = 0.5 * step - 0.5
    transform = np.array([[step, 0, offset], [0, step, offset]], np.float64)
    size = size_at_crop_mpp(image.shape[1], image.shape[0], mpp=mpp)
    return cv2.warpAffine(
        image, transform, size, flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )


def cut_patches(
    paths: Sequence[Path], *, mpp: float | Sequence[float] = CELL_MPP, desc: str
) -> tuple[np.ndarray, np.ndarray]:
    """The middle of ready-made patches: crops uint8 [K, 60, 60, 3], and which of the N patches they are of: bool [N].

    Args:
        paths: images whose centre is the nucleus.
        mpp: um/px of all, or of each.
        desc: what the progress bar says.

    Raises:
        TaskError: a patch is absent or no image.
    """
    resolution = np.broadcast_to(np.asarray(mpp, np.float64), len(paths))
    images = np.empty((len(paths), CELL_PX, CELL_PX, 3), np.uint8)
    kept = np.zeros(len(paths), bool)
    for index, path in enumerate(tqdm(paths, unit="patch", desc=desc, disable=None)):
        crop = middle(read_image(path, error=TaskError), mpp=float(resolution[index]))
        if crop is not None and not has_black_margin(crop):
            images[index], kept[index] = crop, True
    return images[kept] if not kept.all() else images, kept


def middle(patch: np.ndarray, *, mpp: float) -> np.ndarray | None:
    """The central crop uint8 [60, 60, 3] of a patch [H, W, 3]; None where the patch is smaller."""
    high, wide = patch.shape[:2]
    crops, _ = cut_cells(patch, np.array([[(wide - 1) / 2, (high - 1) / 2]]), mpp=mpp)
    return crops[0] if len(crops) else None


def has_black_margin(crop: np.ndarray) -> bool:
    """Whether an outermost row or column of a crop [60, 60, 3] is black: its authors filled what lay over the edge."""
    return any(bool((line <= _BLACK).all()) for line in (crop[0], crop[-1], crop[:, 0], crop[:, -1]))
