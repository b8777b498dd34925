"""NuCLS, corrected single-rater: types of nuclei in breast cancer (TCGA-BRCA), at three levels of detail.

Licence: CC0. To obtain: https://sites.google.com/view/nucls, "single-rater", corrected; 1,744 fields, 59,485 nuclei at
0.2 um/px. Expected folder:

    csv/<field>.csv       raw_classification, xmin, ymin, xmax, ymax, ... (the first column has no name)
    rgb/<field>.png       <field> is TCGA-A2-A0SX-DX1_id-<hex>_left-<n>_top-<n>_bottom-<n>_right-<n>
    train_test_splits/fold_{1..5}_{train,test}.csv    slide_name, hospital, ...

Tasks ``nucls-super``, ``nucls-main`` and ``nucls-raw``. Labels follow from the raw class by the maps below. Super and
main leave out other_nucleus and AMBIGUOUS; raw keeps apoptotic_body and leaves out unlabeled. Counts of the paper's
Table 3 are in ``CLASSES``; its number for ductal_epithelium is not known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from lemon.probe.folds import LEAK_FREE, N_FOLDS, fold_faults, leak_free, official_folds, random_protocol
from lemon.probe.task import Count, Protocol, Task, TaskEntry, TaskError
from lemon.probe.tasks.assemble import check_labels, classification_task, published, read_rows
from lemon.probe.tasks.crops import cut_by_image
from lemon.runtime.tables import ANY_NUMBER, Column
from lemon.slides.images import read_image

OBTAIN = "NuCLS, corrected single-rater (CC0): https://sites.google.com/view/nucls"
MPP = 0.2
BOX = ("xmin", "ymin", "xmax", "ymax")
NUCLEI = published(
    "raw_classification", *(Column(side, filled=True, number=ANY_NUMBER) for side in BOX), may_be_empty=True
)
SPLIT = published("slide_name", "hospital")

RAW_TO_MAIN = {
    "tumor": "tumor_nonMitotic",
    "mitotic_figure": "tumor_mitotic",
    "fibroblast": "nonTILnonMQ_stromal",
    "vascular_endothelium": "nonTILnonMQ_stromal",
    "macrophage": "macrophage",
    "lymphocyte": "lymphocyte",
    "plasma_cell": "plasma_cell",
    "neutrophil": "other_nucleus",
    "eosinophil": "other_nucleus",
    "myoepithelium": "other_nucleus",
    "ductal_epithelium": "other_nucleus",
    "apoptotic_body": "AMBIGUOUS",
    "unlabeled": "AMBIGUOUS",
}
MAIN_TO_SUPER = {
    "tumor_nonMitotic": "tumor_any",
    "tumor_mitotic": "tumor_any",
    "nonTILnonMQ_stromal": "nonTIL_stromal",
    "macrophage": "nonTIL_stromal",
    "lymphocyte": "sTIL",
    "plasma_cell": "sTIL",
    "other_nucleus": "other_nucleus",
    "AMBIGUOUS": "AMBIGUOUS",
}
MAPS: dict[str, dict[str, str]] = {
    "raw": {raw: raw for raw in RAW_TO_MAIN},
    "main": RAW_TO_MAIN,
    "super": {raw: MAIN_TO_SUPER[main] for raw, main in RAW_TO_MAIN.items()},
}
CLASSES: dict[str, dict[str, int | None]] = {
    "super": {"tumor_any": 16_052, "sTIL": 13_642, "nonTIL_stromal": 7_613},
    "main": {
        "tumor_nonMitotic": 15_874,
        "lymphocyte": 9_617,
        "nonTILnonMQ_stromal": 6_634,
        "plasma_cell": 4_025,
        "macrophage": 979,
        "tumor_mitotic": 178,
    },
    "raw": {
        "tumor": 15_874,
        "lymphocyte": 9_617,
        "fibroblast": 6_258,
        "plasma_cell": 4_025,
        "macrophage": 979,
        "vascular_endothelium": 376,
        "apoptotic_body": 293,
        "mitotic_figure": 178,
        "neutrophil": 35,
        "myoepithelium": 33,
        "eosinophil": 2,
        "ductal_epithelium": None,
    },
}
"""Classes of each level, with the paper's counts."""

PATIENTS_NOTE = (
    "the patients are of TCGA-BRCA: lemon pretrain leaves them out of its cells with exclude_benchmarks=nucls"
)

_FIELD = re.compile(
    r"^(?P<slide>(?P<patient>TCGA-(?P<tss>\w{2})-\w{4})-DX\w+?)_id-[0-9a-f]+_left-\d+_top-\d+_", re.ASCII
)

Splits = dict[str, tuple[frozenset[str], frozenset[str]]]  # by fold, the slides of train and test


def load(folder: Path, *, level: str = "super", seed: int = 0) -> Task:
    """Nuclei of the corrected single-rater set, with random folds (paper) and the authors' by hospital (leak-free).

    Args:
        folder: as the module's head says.
        level: ``super``, ``main`` or ``raw``.
        seed: of random folds, and of folds by hospital, should the authors' ones divide one.

    Raises:
        TaskError: a file or column is absent, or a class or file name is unknown.
    """
    splits, hospitals = read_splits(folder / "train_test_splits")
    nuclei, n_fields = read_nuclei(folder / "csv")
    nuclei["label"] = [MAPS[level][raw] for raw in nuclei["raw"]]
    labelled = nuclei[nuclei["label"].isin(CLASSES[level])]
    images, kept = cut_by_image(
        labelled["field"].to_numpy(str),
        labelled[["x", "y"]].to_numpy(np.float64),
        lambda field: (read_image(folder / "rgb" / f"{field}.png", error=TaskError), MPP),
        desc="nucls crops",
    )
    rows = labelled[kept]
    return classification_task(
        f"nucls-{level}",
        rows=_with_groups(rows, hospitals),
        images=images,
        classes=CLASSES[level],
        folds=lambda left: _protocols(left, splits, seed=seed),
        counts=(
            Count("fields", n_fields, 1_744),
            Count("nuclei", len(nuclei), 59_485),
            Count(f"of a class of level {level}", len(labelled)),
            Count("whole crop inside the field", len(rows)),
            Count("of a slide in the official splits", int(rows["slide"].isin(list(hospitals)).sum())),
        ),
        group="hospital",
        batch="hospital",
        notes=(PATIENTS_NOTE, "leak-free: the authors' folds by hospital, or others by hospital if those divide one"),
    )


def read_nuclei(folder: Path) -> tuple[pd.DataFrame, int]:
    """All nuclei: field, slide, patient, sample_id, raw class without ``correction_``, x, y in px; and the fields.

    Raises TaskError where there is no table, or a name, class or number cannot be read.
    """
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise TaskError(f"{folder}: no table of nuclei; expected <field>.csv of {OBTAIN}")
    tables = [_read_field(path) for path in tqdm(paths, unit="field", desc="nucls tables", disable=None)]
    return pd.concat(tables, ignore_index=True), len(paths)


def _read_field(path: Path) -> pd.DataFrame:
    match = _FIELD.match(path.stem)
    if match is None:
        raise TaskError(f"{path}: unknown name; expected TCGA-A2-A0SX-DX1_id-<hex>_left-<n>_top-<n>_...: rename it")
    table = read_rows(path, NUCLEI)
    raw = table["raw_classification"].str.removeprefix("correction_")
    check_labels(raw.unique(), RAW_TO_MAIN, where=path)
    box = table[list(BOX)].to_numpy(np.float64)
    columns = {"field": path.stem, "slide": match["slide"], "patient": match["patient"], "tss": match["tss"]}
    frame = pd.DataFrame({"raw": raw, "x": (box[:, 0] + box[:, 2]) / 2, "y": (box[:, 1] + box[:, 3]) / 2})
    return frame.assign(**columns, sample_id=[f"{path.stem}_{row}" for row in range(len(table))])


def read_splits(folder: Path) -> tuple[Splits, dict[str, str]]:
    """The authors' folds as slide names, and the hospital of each slide; raises TaskError where one is absent."""
    splits: Splits = {}
    hospitals: dict[str, str] = {}
    for number in range(1, N_FOLDS + 1):
        sides = []
        for side in ("train", "test"):
            table = read_rows(folder / f"fold_{number}_{side}.csv", SPLIT)
            hospitals |= dict(zip(table["slide_name"], table["hospital"], strict=True))
            sides.append(frozenset(table["slide_name"]))
        splits[str(number)] = (sides[0], sides[1])
    return splits, hospitals


def _with_groups(nuclei: pd.DataFrame, hospitals: Mapping[str, str]) -> pd.DataFrame:
    """Rows with the hospital that the splits name; of slides that they lack, the barcode's tissue source site."""
    hospital = nuclei["slide"].map(hospitals).fillna(nuclei["tss"])
    return nuclei[["sample_id", "label", "slide", "patient"]].assign(hospital=hospital)


def _protocols(rows: pd.DataFrame, splits: Splits, *, seed: int) -> tuple[Protocol, ...]:
    hospitals = rows["hospital"].to_numpy(str)
    apart = Protocol(LEAK_FREE, official_folds(rows["slide"].to_numpy(str), splits), inner_groups=hospitals)
    if any("on both sides" in line for line in fold_faults(apart)):
        apart = leak_free(hospitals, labels=rows["label"].to_numpy(str), seed=seed)
    return random_protocol(len(rows), seed=seed), apart


def patients(_folder: str) -> list[str]:
    """All 124 patients of the set, by TCGA's barcode; a shipped list, so that the folder need not be there."""
    lines = Path(__file__).with_name("nucls_patients.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


SUPER, MAIN, RAW = (TaskEntry("nucls", partial(load, level=level), OBTAIN, patients) for level in CLASSES)
