"""``folder:NAME``: any labelled crops of a user.

Expected folder ``NAME`` in the data folder:

    labels.csv     image, label, slide, and where known patient, hospital, scanner, mpp
    the images     at the paths, relative to the folder, that the column image has; the nucleus in the middle

``mpp`` is um/px of the image, 0.25 where the column is absent; images are resampled to 0.25 um/px and cut to 60 px. The
exception to the border policy: an image smaller than that but of 40 px or more, the view that encoders see, is set on
white, and counted. Folds are by patient where that is known, else by slide. Licence and counts are the user's.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lemon.probe.task import Count, Task, TaskError
from lemon.probe.tasks.assemble import MIN_SUPPORT, by_group, classification_task
from lemon.probe.tasks.crops import middle, read_rgb
from lemon.probe.tasks.tables import numbers, read_rows
from lemon.schema import CROP_MPP, CROP_PX

OBTAIN = "labels.csv with the columns image, label, slide, and the images that it names"
GROUPS = ("slide", "patient", "hospital", "scanner")
VIEW_PX = 40  # the least that an image must show at 0.25 um/px


def load(folder: Path, *, name: str, seed: int = 0, min_support: int = MIN_SUPPORT) -> Task:
    """Labelled crops of ``labels.csv``; raises TaskError where a file, column or number is not as expected."""
    path = folder / "labels.csv"
    table = read_rows(path, columns=("image", "label", "slide"), optional=("patient", "hospital", "scanner", "mpp"))
    n_rows, table = len(table), table[table["label"] != ""].reset_index(drop=True)
    mpp = numbers(table, ("mpp",), path=path)[:, 0] if "mpp" in table else np.full(len(table), CROP_MPP)
    if not (mpp > 0).all():
        raise TaskError(f"{path}: mpp={mpp.min()}; expected um/px above 0: mend the row")
    crops = [_crop(folder / image, mpp=float(value)) for image, value in zip(table["image"], mpp, strict=True)]
    n_filled = sum(filled for _, filled in crops)
    groups = [column for column in GROUPS if column in table]
    batches = [column for column in ("hospital", "scanner") if column in table and table[column].nunique() > 1]
    by = "patient" if "patient" in table else "slide"
    notes = [f"{n_filled} crops are smaller than {CROP_PX} px and set on white"] if n_filled else []
    return classification_task(
        f"folder:{name}",
        rows=table[["image", "label", *groups]].rename(columns={"image": "sample_id"}),
        images=np.stack([crop for crop, _ in crops]) if crops else np.empty((0, CROP_PX, CROP_PX, 3), np.uint8),
        classes=dict.fromkeys(sorted(table["label"].unique())),
        folds=by_group(by, seed=seed),
        counts=(Count("rows", n_rows), Count("with a label", len(table)), Count("set on white", n_filled)),
        group=by,
        cluster=by,
        batch=batches[0] if batches else None,
        notes=notes,
        min_support=min_support,
    )


def _crop(path: Path, *, mpp: float) -> tuple[np.ndarray, bool]:
    """The middle uint8 [60, 60, 3] of an image at 0.25 um/px, and whether it was set on white."""
    image = read_rgb(path)
    crop = middle(image, mpp=mpp)
    if crop is not None:
        return crop, False
    high, wide = image.shape[:2]
    shown_px = min(high, wide) * mpp / CROP_MPP
    if shown_px < VIEW_PX - 0.5:
        expected = f"expected {VIEW_PX} px or more, {VIEW_PX * CROP_MPP:g} um: cut larger crops, or mend mpp"
        raise TaskError(f"{path}: {wide}x{high} px of {mpp:g} um/px are {shown_px:.0f} px at 0.25 um/px; {expected}")
    margin = math.ceil(CROP_PX * CROP_MPP / mpp / 2) + 1
    image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    crop = middle(image, mpp=mpp)
    assert crop is not None
    return crop, True
