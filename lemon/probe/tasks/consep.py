"""CoNSeP: types of nuclei in colorectal adenocarcinoma.

Licence: research use only. To obtain: https://warwick.ac.uk/fac/cross_fac/tia/data/hovernet, 41 images of 1000x1000 px
at 0.25 um/px, 24,319 nuclei. Expected folder, either of:

    Train/Labels/<name>.mat, Train/Images/<name>.png, and Test likewise: as downloaded; inst_map and type_map of 7 types
    <name>_inst.npz, <name>.jpg or .png: inst_map, and type_map of the 4 classes below

Classes are those of HoVer-Net: 1 miscellaneous, 2 inflammatory, 3 epithelial (healthy or malignant), 4 spindle
(fibroblast, muscle, endothelial). Not in the paper's tables. Folds by image; the set does not say which images share a
patient.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.io import loadmat

from lemon.probe.task import Count, Task, TaskEntry, TaskError
from lemon.probe.tasks.assemble import by_group, classification_task
from lemon.probe.tasks.crops import cut_by_image
from lemon.schema import CELL_MPP
from lemon.slides.images import read_image

OBTAIN = "CoNSeP (research use only): https://warwick.ac.uk/fac/cross_fac/tia/data/hovernet"
CLASSES = ("miscellaneous", "inflammatory", "epithelial", "spindle")
SEVEN_TO_FOUR = np.array([0, 1, 2, 3, 3, 4, 4, 4])  # of the downloaded type_map


def load(folder: Path, *, seed: int = 0) -> Task:
    """Every nucleus of the type maps; raises TaskError where a file is absent or a type unknown."""
    maps = _list_maps(folder)
    pictures = {path.stem.removesuffix("_inst"): _picture_of(path) for path in maps}
    nuclei = pd.concat([_read_nuclei(path) for path in maps], ignore_index=True)
    typed = nuclei[nuclei["label"] != ""]
    images, kept = cut_by_image(
        typed["slide"].to_numpy(str),
        typed[["x", "y"]].to_numpy(np.float64),
        lambda name: (read_image(pictures[name], error=TaskError), CELL_MPP),
        desc="consep",
    )
    rows = typed[kept].assign(
        x_um=lambda each: (each["x"] + 0.5) * CELL_MPP, y_um=lambda each: (each["y"] + 0.5) * CELL_MPP
    )
    return classification_task(
        "consep-type",
        rows=rows[["sample_id", "label", "slide", "x_um", "y_um"]],
        images=images,
        classes=dict.fromkeys(CLASSES),
        folds=by_group("slide", seed=seed),
        counts=(
            Count("images", len(maps), 41),
            Count("nuclei", len(nuclei), 24_319),
            Count("nuclei with a type", len(typed)),
            Count("whole crop inside the image", len(rows)),
        ),
        notes=("folds are by image; images of one patient may be on both sides: the set does not tell",),
    )


def _list_maps(folder: Path) -> list[Path]:
    maps = sorted(folder.glob("*_inst.npz")) or sorted(folder.glob("*/Labels/*.mat"))
    if not maps:
        raise TaskError(f"{folder}: neither *_inst.npz nor */Labels/*.mat; expected {OBTAIN}")
    return maps


def _picture_of(path: Path) -> Path:
    """The image that a map is of."""
    name, beside = path.stem.removesuffix("_inst"), path.parent
    folder = beside.parent / "Images" if path.suffix == ".mat" else beside
    paths = [folder / f"{name}{suffix}" for suffix in (".png", ".jpg") if (folder / f"{name}{suffix}").is_file()]
    if not paths:
        raise TaskError(
            f"{path}: no image {folder / name}.png or .jpg; expected one beside each map: download it again"
        )
    return paths[0]


def _read_nuclei(path: Path) -> pd.DataFrame:
    """Nuclei of one map: slide (the image), sample_id, label ("" for none), x, y: the centroid in px."""
    arrays = loadmat(path) if path.suffix == ".mat" else np.load(path)
    absent = [name for name in ("inst_map", "type_map") if name not in arrays]
    if absent:
        raise TaskError(f"{path}: no {absent[0]}; it has {', '.join(arrays)}; expected inst_map and type_map")
    inst, types = (np.asarray(arrays[name]).astype(int) for name in ("inst_map", "type_map"))
    types = _four_types(types, path=path)
    name = path.stem.removesuffix("_inst")
    ids = np.unique(inst[inst > 0])
    centroid = np.array(ndimage.center_of_mass(inst > 0, inst, ids)).reshape(-1, 2)  # y, x
    kind = ndimage.maximum(types, inst, ids).astype(int) if len(ids) else np.empty(0, int)  # a nucleus has one type
    return pd.DataFrame(
        {
            "slide": name,
            "sample_id": [f"{name}_{number}" for number in ids],
            "label": np.array(["", *CLASSES])[kind],
            "x": centroid[:, 1],
            "y": centroid[:, 0],
        }
    )


def _four_types(types: np.ndarray, *, path: Path) -> np.ndarray:
    known = len(SEVEN_TO_FOUR) if path.suffix == ".mat" else len(CLASSES) + 1
    if types.max(initial=0) >= known or types.min(initial=0) < 0:
        wrong = types.max() if types.max() >= known else types.min()
        raise TaskError(f"{path}: unknown class {wrong} in type_map; expected 0 to {known - 1}, 0 where no nucleus is")
    return SEVEN_TO_FOUR[types] if path.suffix == ".mat" else types


ENTRY = TaskEntry("consep", load, OBTAIN)
