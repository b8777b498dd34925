"""Labelled images in memory, at one resolution, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Labelled:
    """One image and its instances.

    ``image`` is uint8 [H, W, 3] (RGB), ``instances`` int32 [H, W] with 0 for background.
    """

    source: str
    name: str
    image: np.ndarray
    instances: np.ndarray

    def __post_init__(self) -> None:
        if self.image.shape != (*self.instances.shape, 3) or self.image.dtype != np.uint8:
            raise ValueError(
                f"{self.source}/{self.name}: image {self.image.dtype} {self.image.shape}, instances "
                f"{self.instances.shape}; expected uint8 [H, W, 3] and [H, W]"
            )


def enlarged(labelled: Labelled, *, factor: float) -> Labelled:
    """The image with cubic, its instances with nearest interpolation, ``factor`` times as large."""
    if factor == 1:
        return labelled
    size = tuple(round(side * factor) for side in labelled.instances.shape[::-1])
    return Labelled(
        labelled.source,
        labelled.name,
        cv2.resize(labelled.image, size, interpolation=cv2.INTER_CUBIC),
        cv2.resize(labelled.instances, size, interpolation=cv2.INTER_NEAREST),
    )


def split(images: Sequence[Labelled], *, held_out_share: float) -> tuple[list[Labelled], list[Labelled]]:
    """(for training, held out): of each source the share of its images with the lowest hash of their names.

    A source of two images or more has at least one of them held out, if the share is above 0.
    """
    kept, held_out = [], []
    for source in dict.fromkeys(image.source for image in images):
        of_source = sorted(
            (i for i in images if i.source == source), key=lambda i: hashlib.sha256(i.name.encode()).digest()
        )
        count = max(1, round(held_out_share * len(of_source))) if held_out_share > 0 and len(of_source) > 1 else 0
        held_out += of_source[:count]
        kept += of_source[count:]
    return kept, held_out
