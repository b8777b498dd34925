"""``folder:NAME``: any labelled crops of a user.

Expected folder ``NAME`` in the data folder:

    labels.csv     image, label, slide, and where known patient, hospital, scanner, mpp
    the images     at the paths, relative to the folder, that the column image has; the nucleus in the middle

``mpp`` is um/px of the image, 0.25 where the column is absent; images are resampled to 0.25 um/px and cut to 60 px. The
exception to the border policy: an image smaller than that but of 40 px or more, the view that encoders see, is set on
white, and counted. Grey images are counted. Folds are by patient where that is known, else by slide: a crop without a
patient is of the one that other crops of its slide have, else its slide is a patient of its own, and a slide of several
patients with crops of none is refused. A hospital or scanner that some crops lack is no batch. Licence and counts are
the user's.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd

from lemon.probe.folds import one_name_each
from lemon.probe.task import Count, Task, TaskError
from lemon.probe.tasks.assemble import MIN_SUPPORT, by_group, classification_task
from lemon.probe.tasks.crops import middle
from lemon.runtime.identifiers import look_alikes_line, some
from lemon.runtime.tables import Column, Form, read_user_table
from lemon.schema import CELL_MPP, CELL_PX, VIEW_PX
from lemon.slides.images import read_image
from lemon.slides.resolution import PLAUSIBLE_MPP

OBTAIN = "labels.csv with the columns image, label, slide, and the images that it names"
GROUPS = ("slide", "patient", "hospital", "scanner")


FORM = Form(
    "",
    (
        Column("image", filled=True),
        Column("label", keep=frozenset(["-", "--"])),  # a class, beside +
        Column("slide", filled=True),
        *(Column(name, required=False) for name in GROUPS[1:]),
        Column("mpp", required=False, filled=True, number=PLAUSIBLE_MPP, unit="um/px"),
    ),
    error=TaskError,
)


def patients(folder: str) -> list[str]:
    """Patients and slides that ``labels.csv`` names; raises TaskError as ``load`` does."""
    columns = read_user_table(f"{folder}/labels.csv", form=FORM).columns
    return sorted({name for key in ("patient", "slide") for name in columns.get(key, ()) if name})


def load(folder: Path, *, name: str, seed: int = 0, min_support: int = MIN_SUPPORT) -> Task:
    """Labelled crops of ``labels.csv``; raises TaskError where a file, column or number is not as expected."""
    read = read_user_table(folder / "labels.csv", form=FORM)
    table = pd.DataFrame(read.columns)
    n_rows, table = len(table), table[table["label"].notna()].reset_index(drop=True)
    mpp = table["mpp"] if "mpp" in table else np.full(len(table), CELL_MPP)
    crops = [_crop(folder / image, mpp=float(value)) for image, value in zip(table["image"], mpp, strict=True)]
    by = "patient" if "patient" in table else "slide"
    notes = _fill_patients(table, where=read.place) if "patient" in table else []
    n_filled, n_grey = sum(filled for _, filled in crops), sum(_is_grey(crop) for crop, _ in crops)
    notes += [f"{n_filled} crops are smaller than {CELL_PX} px and set on white"] if n_filled else []
    notes += [f"{n_grey} images are grey: their stain's colours are lost"] if n_grey else []
    batch = _batch_of(table, notes)
    groups = [column for column in GROUPS if column in table]
    notes += filter(None, (look_alikes_line(name, table[name]) for name in ("label", batch) if name))
    return classification_task(
        f"folder:{name}",
        rows=table[["image", "label", *groups]].fillna("").rename(columns={"image": "sample_id"}),
        images=np.stack([crop for crop, _ in crops]) if crops else np.empty((0, CELL_PX, CELL_PX, 3), np.uint8),
        classes=dict.fromkeys(sorted(table["label"].unique())),
        folds=by_group(by, seed=seed),
        counts=(
            Count("rows", n_rows),
            Count("with a label", len(table)),
            Count("set on white", n_filled),
            Count("grey", n_grey),
        ),
        group=by,
        cluster=by,
        batch=batch,
        notes=notes,
        min_support=min_support,
    )


def _fill_patients(table: pd.DataFrame, *, where: str) -> list[str]:
    """Give every crop of ``table`` a patient, by the rule of the module's head; returns notes."""
    slides = one_name_each(table["slide"].to_numpy(str))
    has_patient = table["patient"].notna().to_numpy()
    patients = one_name_each(table["patient"].fillna("").to_numpy(str)).astype(object)
    of_slide: dict[str, set[str]] = {}
    for slide, patient in zip(slides[has_patient].tolist(), patients[has_patient].tolist(), strict=True):
        of_slide.setdefault(slide, set()).add(patient)
    for index in np.flatnonzero(~has_patient).tolist():
        known = sorted(of_slide.get(slides[index], {f"slide {slides[index]}"}))
        if len(known) > 1:
            got = f"{slides[index]} has crops of {some(known)} and crops without a patient"
            raise TaskError(f"{where}: {got}; expected the patient of each: fill the column patient")
        patients[index] = known[0]
    notes = []
    if not has_patient.all():
        how = "they take their slide's, or their slide is a patient of its own"
        notes.append(f"{int((~has_patient).sum())} crops have no patient: {how}")
    if shared := [slide for slide, slide_patients in of_slide.items() if len(slide_patients) > 1]:
        notes.append(f"slides with several patients: {some(shared)}; crops of such a slide are on both sides of folds")
    table["patient"] = patients
    return notes


def _batch_of(table: pd.DataFrame, notes: list[str]) -> str | None:
    """The column that robustness compares: hospital or scanner, if every crop has one and they are not all the same."""
    for column in (name for name in ("hospital", "scanner") if name in table and table[name].nunique() > 1):
        if without := int(table[column].isna().sum()):
            notes.append(f"{column} is no batch: {without} crops have none")
        else:
            return column
    return None


def _is_grey(crop: np.ndarray) -> bool:
    return bool((crop[..., :1] == crop).all())


def _crop(path: Path, *, mpp: float) -> tuple[np.ndarray, bool]:
    """The middle uint8 [60, 60, 3] of an image at 0.25 um/px, and whether it was set on white."""
    image = read_image(path, error=TaskError)
    crop = middle(image, mpp=mpp)
    if crop is not None:
        return crop, False
    high, wide = image.shape[:2]
    shown_px = min(high, wide) * mpp / CELL_MPP
    if shown_px < VIEW_PX - 0.5:
        expected = f"expected {VIEW_PX} px or more, {VIEW_PX * CELL_MPP:g} um: cut larger crops, or mend mpp"
        raise TaskError(f"{path}: {wide}x{high} px of {mpp:g} um/px are {shown_px:.0f} px at 0.25 um/px; {expected}")
    margin = math.ceil(CELL_PX * CELL_MPP / mpp / 2) + 1
    image = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    crop = middle(image, mpp=mpp)
    assert crop is not None
    return crop, True
