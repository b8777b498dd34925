from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lemon.nuclei.training.images import Labelled


def blobs(*, size_px: int = 96, seed: int = 0) -> np.ndarray:
    """Instance map int32 of discs on a jittered grid, some cut by the border, some touching."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size_px, :size_px]
    instances = np.zeros((size_px, size_px), np.int32)
    label = 0
    for cy in range(0, size_px, 18):
        for cx in range(0, size_px, 18):
            label += 1
            jx, jy, radius = rng.uniform(-3, 3), rng.uniform(-3, 3), rng.uniform(5, 9)
            instances[(x - cx - jx) ** 2 + (y - cy - jy) ** 2 <= radius**2] = label
    return instances


def labelled(*, size_px: int = 96, seed: int = 0, source: str = "made up", name: str | None = None) -> Labelled:
    """An image, dark where nuclei are, each pixel a little different, and its instances."""
    instances = blobs(seed=seed, size_px=size_px)
    noise = np.random.default_rng(seed).integers(0, 20, (size_px, size_px, 1))
    image = (np.where(instances[..., None] > 0, (110, 70, 140), (225, 190, 210)) + noise).astype(np.uint8)
    return Labelled(source, name or str(seed), image, instances)


def stored(folder: Path, image: Labelled) -> None:
    """Write an image as ``read_folder`` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.image).save(folder / f"{image.name}.png")
    np.savez_compressed(folder / f"{image.name}_inst.npz", inst_map=image.instances.astype(np.uint16))
