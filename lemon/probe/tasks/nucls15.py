"""NuCLS excerpt: 15 tiles with points, for a look at NuCLS' super classes where the whole set is not at hand.

Licence: CC0. To obtain: an excerpt of https://sites.google.com/view/nucls; any tiles with such a table do. Folder:

    nuclei.csv       split, image, x, y, label (sTIL, nonTIL_stromal, tumor_any, other_nucleus)
    <image>.png      at about 0.2 um/px

Not in the paper's tables, and small: read its scores with their intervals. other_nucleus is left out, as at NuCLS'
super level. Folds by tile over train and test together; which tiles share a slide is not known.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lemon.probe.task import Count, Task, TaskEntry, TaskError
from lemon.probe.tasks import nucls
from lemon.probe.tasks.assemble import by_group, check_labels, classification_task, published, read_rows
from lemon.probe.tasks.crops import cut_by_image
from lemon.runtime.tables import ANY_NUMBER, Column
from lemon.slides.images import read_image

OBTAIN = "the excerpt of NuCLS (CC0): nuclei.csv and 15 tiles"
CLASSES = tuple(nucls.CLASSES["super"])
NUCLEI = published("image", *(Column(axis, filled=True, number=ANY_NUMBER) for axis in ("x", "y")), "label")


def load(folder: Path, *, seed: int = 0) -> Task:
    """Nuclei of the super classes; raises TaskError where a file, column or class is not as expected."""
    path = folder / "nuclei.csv"
    table = read_rows(path, NUCLEI)
    check_labels(table["label"].unique(), nucls.MAIN_TO_SUPER.values(), where=path)
    centre = table[["x", "y"]].to_numpy(float)
    labelled = table["label"].isin(CLASSES).to_numpy()
    images, kept = cut_by_image(
        table["image"].to_numpy(str)[labelled],
        centre[labelled],
        lambda name: (read_image(folder / f"{name}.png", error=TaskError), nucls.MPP),
        desc="nucls15",
    )
    rows = pd.DataFrame(
        {
            "sample_id": [f"{image}_{row}" for row, image in enumerate(table["image"])],
            "label": table["label"],
            "slide": table["image"],
            "x_um": (centre[:, 0] + 0.5) * nucls.MPP,
            "y_um": (centre[:, 1] + 0.5) * nucls.MPP,
        }
    )[labelled][kept]
    return classification_task(
        "nucls15-super",
        rows=rows,
        images=images,
        classes=dict.fromkeys(CLASSES),
        folds=by_group("slide", seed=seed),
        counts=(
            Count("tiles", table["image"].nunique()),
            Count("nuclei", len(table)),
            Count("of a super class", int(labelled.sum())),
            Count("whole crop inside the tile", len(rows)),
        ),
        notes=(
            "folds are by tile; tiles of one slide may be on both sides: the excerpt does not tell",
            "the tiles are of TCGA-BRCA, the excerpt does not tell whose: leave NuCLS' patients out of pretraining",
        ),
    )


ENTRY = TaskEntry("nucls15", load, OBTAIN, nucls.patients)  # of which of them is not known
