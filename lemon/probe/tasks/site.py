"""``site:PATH``: how much of the hospital do embeddings of curated cells tell? Needs no labels but the column ``site``.

PATH is an output of ``lemon curate`` whose cohort names the site of slides (of TCGA the barcode does). A linear probe
tells the site of the ``n_cells`` cells of lowest rank, on patients (slides where none is named) that it has not seen,
so that a slide's own look does not count. Less is better: chance is 1 / sites. Where sites differ in organ or disease,
that is told with the site; a note says so for organs.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from lemon.probe.folds import one_name_each
from lemon.probe.task import Count, Task, TaskError
from lemon.probe.tasks.assemble import by_group, classification_task
from lemon.probe.tasks.curated import read_cells

_COLUMNS = ("site", "patient_id", "organ")


def load(folder: str, *, seed: int = 0, n_cells: int = 10_000) -> Task:
    """Classification of the site; raises TaskError where there are no cells, or of fewer than two sites."""
    cells = read_cells(folder, task="site", n_cells=n_cells, columns=_COLUMNS)
    told = pd.DataFrame({name: cells.rows[name].to_pylist() for name in _COLUMNS}, dtype=object)
    known = (told["site"].notna() & (told["site"] != "")).to_numpy()
    if not known.any():
        raise TaskError(f"site: no cell of {folder} has a site; expected the column site in the cohort: curate with it")
    slide = cells.groups["slide"][known]
    site = one_name_each(told["site"][known].to_numpy(str))
    patient = told["patient_id"][known].to_numpy()
    rows = pd.DataFrame(
        {
            "sample_id": cells.cell_ids[known],
            "label": site,
            "site": site,
            "slide": slide,
            "patient": np.where(pd.isna(patient), slide, patient).astype(str),
        }
    )
    return classification_task(
        f"site:{folder}",
        rows=rows,
        images=cells.images[known],
        classes=dict.fromkeys(np.unique(site).tolist()),
        folds=by_group("patient", seed=seed),
        counts=(*cells.counts, Count("cells", len(known)), Count("of a known site", len(rows))),
        group="patient",
        cluster="patient",
        batch="site",
        notes=_organ_notes(site, told["organ"][known].to_numpy()),
    )


def _organ_notes(site: np.ndarray, organ: np.ndarray) -> tuple[str, ...]:
    """A line where the organ tells of the site."""
    shares = pd.crosstab(site, pd.Series(organ).fillna("unknown").to_numpy(), normalize="index")
    if (shares.max() - shares.min()).max() < 0.1:  # sites mix organs alike
        return ()
    return ("sites differ in organ: part of what is told is the organ",)
