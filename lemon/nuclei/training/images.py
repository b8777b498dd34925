"""Labelled images in memory, at one resolution, and which of them are held out."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from lemon.slides.images import read_image

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


def read_folder(folder: str | Path) -> list[Labelled]:
    """Images of a folder of ``<name>.<jpg, png, tif>`` and ``<name>_inst.npz`` (``inst_map``), sorted by name.

    An ``images.csv`` with the columns ``image`` and ``objective_power`` names images at 20x: they are enlarged twice,
    and are a source of their own, ``<folder>_20x``.
    """
    folder = Path(folder)
    at_20x = _names_at_20x(folder / "images.csv")
    names = sorted(path.name.removesuffix("_inst.npz") for path in folder.glob("*_inst.npz"))
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _read(folder, name, enlarge=2.0 if name in at_20x else 1.0), names))


def _names_at_20x(table: Path) -> set[str]:
    if not table.exists():
        return set()
    with table.open(encoding="utf-8") as file:
        return {row["image"] for row in csv.DictReader(file) if row.get("objective_power") == "20"}


def _read(folder: Path, name: str, *, enlarge: float) -> Labelled:
    file = next(
        (folder / f"{name}{suffix}" for suffix in IMAGE_SUFFIXES if (folder / f"{name}{suffix}").is_file()), None
    )
    if file is None:
        raise ValueError(f"{folder}/{name}: no image beside {name}_inst.npz")
    with np.load(folder / f"{name}_inst.npz", allow_pickle=False) as stored:
        if "inst_map" not in stored:
            raise ValueError(f"{folder}/{name}_inst.npz: got arrays {sorted(stored)}, expected inst_map")
        instances = stored["inst_map"].astype(np.int32)
    source = folder.name if enlarge == 1 else f"{folder.name}_20x"
    return enlarged(Labelled(source, name, read_image(file), instances), factor=enlarge)


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
