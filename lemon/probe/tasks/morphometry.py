"""``morphometry:PATH``: does an embedding tell a nucleus' size, shape and stain? Needs no labels, only curated cells.

PATH is an output of ``lemon curate``, absolute or below the working folder. Targets are what curation measured inside
the outline, which the encoder does not see: area, eccentricity, solidity, hematoxylin density, each standardised. This
is no benchmark of the paper; it tells on one's own slides, within minutes, whether an encoder has learned anything.

Folds are by slide where there are five or more, else by square of 250 um, whose nuclei are neighbours. ``n_cells`` of
lowest rank are taken.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from lemon.cells.select import select_cells
from lemon.cells.shard import images_from_arrow
from lemon.errors import ConfigError
from lemon.probe.folds import N_FOLDS, leak_free
from lemon.probe.task import Count, Task, TaskError
from lemon.probe.tasks.assemble import check_protocols
from lemon.runtime.store import Store
from lemon.schema import MORPHOMETRICS

OBTAIN = "the output of lemon curate"
BLOCK_UM = 250.0
_COLUMNS = ["cell_id", "slide_id", "x_level0_px", "y_level0_px", "mpp", *MORPHOMETRICS, "image"]


def load(folder: str, *, seed: int = 0, n_cells: int = 20_000) -> Task:
    """Regression of the morphometrics of a cells table; raises TaskError where there is none, or of too few cells."""
    try:
        selection = select_cells(Store(folder), n_cells=n_cells)
    except ConfigError as error:
        raise TaskError(f"morphometry: {error}") from None
    parts = [selection.store.read_table(part.name, columns=_COLUMNS).slice(0, part.n_rows) for part in selection.parts]
    rows = pa.concat_tables(parts)
    groups = {"slide": _text(rows["slide_id"]), "block": blocks(rows)}
    by = "slide" if len(selection.parts) >= N_FOLDS else "block"
    protocols = (leak_free(groups[by], seed=seed),)
    return Task(
        name=f"morphometry:{folder}",
        kind="regression",
        images=np.array(images_from_arrow(rows["image"])),
        target=standardised(np.stack([rows[name].to_numpy() for name in MORPHOMETRICS], axis=1)),
        target_names=MORPHOMETRICS,
        sample_ids=_text(rows["cell_id"]),
        groups=groups,
        protocols=protocols,
        cluster=by,
        counts=(Count("slides", len(selection.parts)), Count("squares of 250 um", len(np.unique(groups["block"])))),
        notes=(f"folds are by {by}", *check_protocols("morphometry", protocols, labels=None)),
    )


def blocks(rows: pa.Table) -> np.ndarray:
    """The square of 250 um that each cell lies in: str [N], with its slide."""
    position = np.stack([rows[name].to_numpy() * rows["mpp"].to_numpy() for name in ("x_level0_px", "y_level0_px")], 1)
    square = np.floor(position / BLOCK_UM).astype(int)
    slides = rows["slide_id"].to_pylist()
    return np.array([f"{slide}_{x}_{y}" for slide, (x, y) in zip(slides, square, strict=True)])


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns [N, G] with mean 0 and standard deviation 1, float32; a constant column stays 0."""
    spread = values.std(axis=0)
    return ((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)


def _text(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), str)
