"""Segmenters by their names, and the nuclei of one image in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lemon.nuclei.config import SegmenterChoice
from lemon.nuclei.instances import Nucleus
from lemon.nuclei.segmenter import Segmenter
from lemon.runtime.config import PRESET, Frozen, validate


class _Chosen(Frozen):
    segmenter: SegmenterChoice


def load_segmenter(name: str = "hematoxylin", **settings: Any) -> Segmenter:
    """Open a segmenter by its name, once for many images.

    Args:
        name: ``hematoxylin`` (stain and shape, no weights), ``hoverfast`` (a network; its weights come with LEMON, for
            research only), ``auto`` (hoverfast where there is a GPU, else hematoxylin), or one that another package
            registers.
        settings: ``min_area_um2`` of both; ``checkpoint``, ``device``, ``precision`` and ``batch`` of hoverfast, as
            the keys ``segmenter.*`` of ``lemon curate``.

    Raises:
        ConfigError: no such segmenter or setting, or its weights or device are not there; one line a fault.
    """
    config = validate({"segmenter": {PRESET: name, **settings}}, _Chosen).segmenter
    config.check()
    opened: Segmenter = config.build()
    return opened


def segment(
    image: np.ndarray, *, segmenter: str | Segmenter = "hematoxylin", samples: Sequence[np.ndarray] | None = None
) -> list[Nucleus]:
    """The nuclei of an image of H&E at 0.25 um/px, as of ``SlideReader.region``.

    Args:
        image: uint8 [H, W, 3], RGB.
        segmenter: a name, or what ``load_segmenter`` gave, which is quicker for many images.
        samples: tissue regions of the same slide, uint8 [H, W, 3] each, from which its thresholds are taken, so that
            its images are segmented alike; None: the image by itself.

    Returns:
        One ``Nucleus`` each: its outline ``contour_px`` float32 [N, 2] and its centroid ``centroid_px``, both (x, y) in
        px of the image with whole numbers at pixel centres. Those at the border, cut by it, are among them.

    Raises:
        ConfigError: no segmenter of that name.
        ValueError: the image is of another type or shape.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image: got {got}; expected RGB at 0.25 um/px, uint8 [H, W, 3]")
    opened = load_segmenter(segmenter) if isinstance(segmenter, str) else segmenter
    calibration = opened.calibrate([image] if samples is None else samples)
    (prediction,) = opened.predict(image[None])
    return opened.postprocess(image, prediction, calibration)
