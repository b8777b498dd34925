"""A made-up H&E slide with known nuclei: for tests, and for the demo where no real slide can be had."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile

# Optical densities (R, G, B) of a full stain, near those of scanned H&E.
_HEMATOXYLIN = np.array([0.62, 0.70, 0.35])
_EOSIN = np.array([0.10, 0.42, 0.18])


@dataclass(frozen=True)
class SyntheticTissue:
    """``image`` uint8 [side, side, 3] and the nuclei in it: centres [N, 2] (x, y) and mean radii [N], in px."""

    image: np.ndarray
    center_px: np.ndarray
    radius_px: np.ndarray


def make_tissue(side_px: int, *, seed: int, mpp: float = 0.25, border_px: int = 0) -> SyntheticTissue:
    """Ellipses of 6 to 10 um on a jittered grid in a pink ground, with a white border of glass."""
    rng = np.random.default_rng(seed)
    pitch_px = 16.0 / mpp
    grid = np.arange(border_px + pitch_px, side_px - border_px - pitch_px, pitch_px)
    centers = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    centers = centers + rng.uniform(-0.2, 0.2, centers.shape) * pitch_px
    radii = rng.uniform(3.0, 5.0, (len(centers), 2)) / mpp
    nuclear: np.ndarray = np.zeros((side_px, side_px), np.float32)
    for center, radius in zip(centers, radii, strict=True):
        ellipse = tuple(np.round(center * 16).astype(int).tolist()), tuple(np.round(radius * 16).astype(int).tolist())
        strength = float(rng.uniform(0.75, 1.0))
        cv2.ellipse(nuclear, ellipse[0], ellipse[1], float(rng.uniform(0, 180)), 0, 360, strength, -1, cv2.LINE_AA, 4)
    nuclear = cv2.GaussianBlur(nuclear, (0, 0), 0.4 / mpp)
    ground = np.zeros((side_px, side_px), np.float32)
    inside = slice(border_px, side_px - border_px)
    texture = cv2.GaussianBlur(rng.normal(0, 1, (side_px, side_px)).astype(np.float32), (0, 0), 2 / mpp)
    ground[inside, inside] = 0.55 + 0.15 * (texture / max(texture.std(), 1e-6))[inside, inside]
    density = nuclear[..., None] * _HEMATOXYLIN + np.clip(ground, 0, 1)[..., None] * _EOSIN * (
        1 - 0.7 * nuclear[..., None]
    )
    noisy = 242 * 10.0**-density + rng.normal(0, 2, density.shape)
    return SyntheticTissue(np.clip(noisy, 0, 255).astype(np.uint8), centers, radii.mean(axis=1))


def write_pyramid(
    path: Path, image: np.ndarray, *, mpp: float | None, levels: int = 3, description: str | None = None
) -> None:
    """A tiled TIFF pyramid that OpenSlide opens; a description that begins with "Aperio" makes it an SVS.

    ``mpp`` goes into the TIFF resolution; None leaves it out.
    """
    per_cm: dict[str, Any] = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    options: dict[str, Any] = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "zlib",
        "metadata": None,
        "software": False,
    }
    with tifffile.TiffWriter(path) as writer:
        for level in range(levels):
            sub: dict[str, Any] = {"subfiletype": 1} if level else {}
            writer.write(image, description=description, **sub, **options, **per_cm)
            image = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            per_cm = per_cm and {**per_cm, "resolution": tuple(value / 2 for value in per_cm["resolution"])}
