"""MIDOG: mitotic figures of many tumours. Two tasks.

``midog25-atypical``: normal or atypical mitotic figure, by the majority of three experts; the paper's "MIDOG++
(majority)". To obtain: the training set of track 2 of https://midog2025.deepmicroscopy.org (see its record for the
licence). Expected folder:

    MIDOG25_Atypical_Classification_Train_Set.csv    image_id, filename, coordinateX, coordinateY, Tumor, ..., majority
    MIDOG25_Binary_Classification_Train_Set/         the patches that image_id names, centred on the figure

No resolution is stated: 0.25 um/px is assumed. The paper used KFold(5, shuffle) on patches, so that a slide is on both
sides; the leak-free protocol groups by slide (``filename``). Counts of the paper: 10,191 normal, 1,748 atypical.

``midogpp-mitosis``: mitotic figure, or a look-alike. To obtain: https://github.com/DeepMicroscopy/MIDOGpp (CC0, as its
JSON states). Expected folder: ``databases/MIDOG++.json``, ``datasets_xvalidation.csv``, ``images/001.tiff`` to 553.
Boxes are [x1, y1, x2, y2]. Resolution from the TIFF's tags, else 0.25 um/px. Folds by slide are leak-free: a case has
one.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tifffile

from lemon.probe.task import Count, Task, TaskEntry, TaskError
from lemon.probe.tasks.assemble import by_group, check_labels, classification_task, published, read_rows
from lemon.probe.tasks.crops import cut_by_image, cut_patches
from lemon.runtime.tables import Column
from lemon.schema import CELL_MPP
from lemon.slides.images import read_image
from lemon.slides.resolution import PLAUSIBLE_MPP

OBTAIN = {
    "midog25-atypical": "the training set of MIDOG 2025, track 2: https://midog2025.deepmicroscopy.org",
    "midogpp-mitosis": "MIDOG++ (CC0): https://github.com/DeepMicroscopy/MIDOGpp",
}
ATYPICAL_TABLE = "MIDOG25_Atypical_Classification_Train_Set.csv"
ATYPICAL_FORM = published("image_id", "filename", Column("Tumor"), "majority")
ATYPICAL_IMAGES = "MIDOG25_Binary_Classification_Train_Set"
ATYPICAL = {"NMF": "normal", "AMF": "atypical"}
ATYPICAL_CLASSES: dict[str, int | None] = {"normal": 10_191, "atypical": 1_748}

BOXES = "databases/MIDOG++.json"
SLIDES = "datasets_xvalidation.csv"
SLIDES_FORM = published(Column("Slide", filled=True, number=(1, 1e9)), "Scanner", "Origin")
MITOSIS = {1: "mitotic figure", 2: "not mitotic figure"}
MITOSIS_CLASSES: dict[str, int | None] = {"mitotic figure": 11_937, "not mitotic figure": 14_349}
SCANNERS = {"Hamammatsu XR": "Hamamatsu XR"}  # the table spells one scanner in two ways


def load_atypical(folder: Path, *, seed: int = 0) -> Task:
    """Normal and atypical mitotic figures out of ready-made patches. Raises TaskError."""
    path = folder / ATYPICAL_TABLE
    table = read_rows(path, ATYPICAL_FORM)
    check_labels(table["majority"].unique(), ATYPICAL, where=path)
    names = [name if Path(name).suffix else f"{name}.png" for name in table["image_id"]]
    images, kept = cut_patches([folder / ATYPICAL_IMAGES / name for name in names], desc="midog25")
    rows = pd.DataFrame(
        {
            "sample_id": table["image_id"],
            "label": table["majority"].map(ATYPICAL),
            "slide": table["filename"],
            "tumor": table["Tumor"].fillna(""),
        }
    )[kept]
    return classification_task(
        "midog25-atypical",
        rows=rows,
        images=images,
        classes=ATYPICAL_CLASSES,
        folds=by_group("slide", seed=seed, paper_at_random=True),
        counts=(Count("patches", len(table), 11_939), Count("of 60 px, not cut at an edge", len(rows))),
        notes=("0.25 um/px is assumed of the patches", "the paper's folds have patches of a slide on both sides"),
    )


def load_mitosis(folder: Path, *, seed: int = 0) -> Task:
    """Mitotic figures and look-alikes, cut out of the images of MIDOG++. Raises TaskError."""
    images_of, boxes = read_boxes(folder / BOXES)
    slides = read_slides(folder / SLIDES)
    boxes = boxes.merge(images_of, on="image_id").merge(slides, on="image_id", how="left")
    nowhere = boxes["scanner"].isna()
    if nowhere.any():
        lost = boxes["file_name"][nowhere].iloc[0]
        raise TaskError(f"{folder / SLIDES}: no row of {lost}; expected each image that has boxes: download it again")
    stated: list[str] = []
    images, kept = cut_by_image(
        boxes["file_name"].to_numpy(str),
        boxes[["x", "y"]].to_numpy(np.float64),
        _reader(folder / "images", boxes, stated),
        desc="midog++",
    )
    rows = boxes[kept].rename(columns={"file_name": "slide", "tumor_type": "tumor"})
    return classification_task(
        "midogpp-mitosis",
        rows=rows[["sample_id", "label", "slide", "hospital", "scanner", "tumor"]],
        images=images,
        classes=MITOSIS_CLASSES,
        folds=by_group("slide", seed=seed),
        counts=(
            Count("images", len(images_of), 553),
            Count("images with boxes", boxes["image_id"].nunique(), 503),
            Count("images whose file states its resolution", len(stated)),
            Count("boxes", len(boxes), 26_286),
            Count("whole crop inside the image", len(rows)),
        ),
        batch="scanner",
        notes=("published counts are the data set's own: the paper has no such task",),
    )


def read_boxes(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Images (image_id, file_name, width, height, tumor_type) and boxes (image_id, sample_id, label, x, y: centres).

    ``path`` may be gzipped. Raises TaskError where it is absent, or not in this form, or a category is unknown.
    """
    content = _read_json(path)
    try:
        images = pd.DataFrame(content["images"])[["id", "file_name", "width", "height", "tumor_type"]]
        boxes = pd.DataFrame(content["annotations"])[["id", "image_id", "bbox", "category_id"]]
    except KeyError as error:
        raise TaskError(
            f"{path}: no {error}; expected images and annotations as of {OBTAIN['midogpp-mitosis']}"
        ) from None
    check_labels([str(number) for number in boxes["category_id"].unique()], [str(key) for key in MITOSIS], where=path)
    corners = np.array(boxes["bbox"].to_list(), np.float64)  # x1, y1, x2, y2, not COCO's width and height
    frame = pd.DataFrame(
        {
            "image_id": boxes["image_id"],
            "sample_id": [f"box_{number}" for number in boxes["id"]],
            "label": boxes["category_id"].map(MITOSIS),
            "x": (corners[:, 0] + corners[:, 2]) / 2,
            "y": (corners[:, 1] + corners[:, 3]) / 2,
        }
    )
    return images.rename(columns={"id": "image_id"}), frame


def read_slides(path: Path) -> pd.DataFrame:
    """image_id, scanner and hospital of the semicolon-separated table of slides."""
    table = read_rows(path, SLIDES_FORM)
    return pd.DataFrame(
        {
            "image_id": table["Slide"].astype(int),
            "scanner": table["Scanner"].replace(SCANNERS),
            "hospital": table["Origin"],
        }
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise TaskError(f"{path}: no such file; expected the boxes of {OBTAIN['midogpp-mitosis']}")
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise TaskError(f"{path}: no JSON ({error}); expected the boxes of MIDOG++: download it again") from None


def _reader(folder: Path, boxes: pd.DataFrame, stated: list[str]) -> Callable[[str], tuple[np.ndarray, float]]:
    """Reads an image of the size that the boxes' table has, and its resolution; notes which files state one."""
    sizes = {row.file_name: (row.width, row.height) for row in boxes.drop_duplicates("file_name").itertuples()}

    def read(name: str) -> tuple[np.ndarray, float]:
        image = read_image(folder / name, error=TaskError)
        got, wanted = image.shape[1::-1], sizes[name]
        if got != wanted:
            expected = f"expected {wanted[0]}x{wanted[1]} as {BOXES} has it: download the image again"
            raise TaskError(f"{folder / name}: {got[0]}x{got[1]} px; {expected}")
        mpp = stated_mpp(folder / name)
        stated.extend([name] if mpp else [])
        return image, mpp or CELL_MPP

    return read


def stated_mpp(path: Path) -> float | None:
    """um/px that a TIFF's tags state, if a microscope can have it: editors write 72, 96 or 300 dots an inch."""
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags  # type: ignore[union-attr]
        if "XResolution" not in tags or "ResolutionUnit" not in tags:
            return None
        (numerator, denominator), unit = tags["XResolution"].value, int(tags["ResolutionUnit"].value)
    unit_um = {2: 25_400.0, 3: 10_000.0}.get(unit)  # an inch, a centimetre
    if not unit_um or not numerator:
        return None
    mpp = unit_um * denominator / numerator
    return mpp if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1] else None


ATYPICAL_FIGURES = TaskEntry("midog25", load_atypical, OBTAIN["midog25-atypical"])
MITOTIC_FIGURES = TaskEntry("midogpp", load_mitosis, OBTAIN["midogpp-mitosis"])
