"""AMi-Br: normal or atypical mitotic figures of breast cancer, by the majority of three experts.

Licence: to be cited; for local evaluation only. To obtain: https://github.com/DeepMicroscopy/AMi-Br names the figures;
their crops of 64 px are cut out of MIDOG 2021 and TUPAC 2016. Expected folder:

    labels.csv         slide, dataset, uid, x, y, majority_atypical (True, False), file
    crops64/<file>     64x64 px at about 0.25 um/px, centred on the figure; black where it lies at a slide's edge

Not in the paper's tables: near its MIDOG 2025 task, and small. The excerpt at hand has 3,206 figures of 162 slides, 716
of them atypical. Protocols as for MIDOG 2025: the paper's random folds, and folds by slide. The scanner follows from a
slide's number: those of MIDOG 2021 are 1 to 50, 51 to 100 and 101 to 150, as the table of MIDOG++ has them, too; all
come from one hospital. TUPAC 2016 does not tell its scanners, and counts as another one.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lemon.probe.task import Count, Task, TaskEntry
from lemon.probe.tasks.assemble import by_group, check_labels, classification_task, published, read_rows
from lemon.probe.tasks.crops import cut_patches

OBTAIN = "AMi-Br: https://github.com/DeepMicroscopy/AMi-Br, with crops of 64 px in crops64/"
FIGURES = published("slide", "dataset", "majority_atypical", "file")
LABELS = {"False": "normal", "True": "atypical"}
SCANNERS = ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")
"""Of each fifty slides of MIDOG 2021."""


def load(folder: Path, *, seed: int = 0) -> Task:
    """Crops with the majority's label; raises TaskError where a file, column or class is not as expected."""
    path = folder / "labels.csv"
    table = read_rows(path, FIGURES)
    check_labels(table["majority_atypical"].unique(), LABELS, where=path)
    images, kept = cut_patches([folder / "crops64" / name for name in table["file"]], desc="amibr")
    rows = pd.DataFrame(
        {
            "sample_id": table["file"].str.rsplit(".", n=1).str[0],
            "label": table["majority_atypical"].map(LABELS),
            "slide": table["dataset"] + "/" + table["slide"],
            "source": table["dataset"],
            "scanner": [
                scanner(dataset, slide) for dataset, slide in zip(table["dataset"], table["slide"], strict=True)
            ],
        }
    )[kept]
    return classification_task(
        "amibr",
        rows=rows,
        images=images,
        classes=dict.fromkeys(LABELS.values()),
        folds=by_group("slide", seed=seed, paper_at_random=True),
        counts=(Count("crops", len(table)), Count("not cut at a slide's edge", len(rows))),
        batch="scanner",
        notes=("0.25 um/px is assumed of the crops", "the random folds have crops of a slide on both sides"),
    )


def scanner(dataset: str, slide: str) -> str:
    """The scanner of a slide such as 003.tiff; the name of the data set where that is not known."""
    number = Path(slide).stem
    fifty = (int(number) - 1) // 50 if dataset == "MIDOG21" and number.isdecimal() else len(SCANNERS)
    return SCANNERS[fifty] if 0 <= fifty < len(SCANNERS) else dataset


ENTRY = TaskEntry("amibr", load, OBTAIN)
