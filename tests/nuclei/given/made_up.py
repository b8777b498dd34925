"""A made-up slide whose nuclei are known, and these nuclei in the layouts that other programs write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from lemon.nuclei.given.nuclei import GivenNuclei
from lemon.slides.synthetic import make_tissue, write_pyramid

SIDE, MPP = 800, 0.25
TISSUE = make_tissue(SIDE, seed=3, mpp=MPP)
CENTRES = TISSUE.center_px + 0.5
"""float64 [N, 2], level-0 px, whole numbers at pixel corners."""

COUNT = len(CENTRES)
CLASSES = ["Tumor" if index % 3 else "Immune cells" for index in range(COUNT)]
_ANGLES = 2 * np.pi * np.arange(12) / 12
OUTLINES = CENTRES[:, None] + 13 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
"""float64 [N, 12, 2]: outlines in level-0 px."""


def write_made_up(path: Path) -> Path:
    """The slide, with levels of 800, 400 and 200 px."""
    write_pyramid(path, TISSUE.image, mpp=MPP)
    return path


def uuid_of(index: int) -> str:
    """An id as QuPath writes it."""
    return f"a1b2c3d4-0000-4000-8000-{index:012d}"


def geojson(outlines: np.ndarray = OUTLINES, **changes: Any) -> dict[str, Any]:
    """What QuPath 0.5 exports of detections: a FeatureCollection with closed rings."""
    features = [
        {
            "type": "Feature",
            "id": uuid_of(index),
            "geometry": {"type": "Polygon", "coordinates": [[*outline.tolist(), outline[0].tolist()]]},
            "properties": {
                "objectType": "detection",
                "classification": {"name": CLASSES[index], "color": [200, 0, 0]},
                "measurements": {"Detection probability": 0.5, "Area µm^2": 33.0},
            },
        }
        | changes
        for index, outline in enumerate(outlines)
    ]
    return {"type": "FeatureCollection", "features": features}


def label_image(shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """int32 [H, W]: nucleus ``index`` has the label ``index + 1``."""
    labels = np.zeros(shape, np.int32)
    scale = shape[0] / SIDE
    for index, outline in enumerate(OUTLINES):
        cv2.fillPoly(labels, [np.round(outline * scale - 0.5).astype(np.int32)], index + 1)
    return labels


def contour_of(index: int) -> list[list[int]]:
    """A nucleus' contour as OpenCV finds it: whole numbers at pixel centres."""
    cell = (label_image() == index + 1).astype(np.uint8)
    return cv2.findContours(cell, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0][:, 0].tolist()


def write_json(path: Path, value: Any) -> Path:
    """Indented as some programs write it, so that blanks are everywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))
    return path


def centres_of(nuclei: GivenNuclei) -> np.ndarray:
    """The middle of each outline's box in level-0 px: float64 [N, 2]."""
    points = (nuclei.points + 0.5 * nuclei.centred) * nuclei.scale
    begins = nuclei.starts[:-1]
    return (np.minimum.reduceat(points, begins, axis=0) + np.maximum.reduceat(points, begins, axis=0)) / 2


def agrees(nuclei: GivenNuclei, *, within: float = 1.0, among: Sequence[int] | None = None) -> bool:
    """Whether nuclei are those of the slide, in its order: centres within so many level-0 px."""
    wanted = CENTRES if among is None else CENTRES[list(among)]
    return len(nuclei) == len(wanted) and bool(np.abs(centres_of(nuclei) - wanted).max() < within)
