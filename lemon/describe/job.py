"""Clusters or classes -> what is different about each: a page with pictures of typical cells, and a table."""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np

from lemon.describe.cells import DescribedCells, read_cells
from lemon.describe.config import DescribeConfig
from lemon.describe.effects import Effect, effects_of, typical
from lemon.describe.page import write_page
from lemon.errors import EXIT_OK
from lemon.runtime.console import stage_logger
from lemon.runtime.lease import hold
from lemon.runtime.store import Store

OUTPUT_NAMES = ("describe.html", "effects.csv")
"""What the stage writes in its output."""

logger = stage_logger(__name__, "describe")


@dataclass(frozen=True)
class Group:
    """A group of cells: its effects, the largest first, and crops of typical cells, uint8 [K, 60, 60, 3]."""

    name: str
    n_cells: int
    effects: list[Effect]
    images: np.ndarray


def main(config: DescribeConfig) -> int:
    """Describe the groups and log where; returns the exit code. Raises ConfigError."""
    with hold(config.output, stage="describe", names=OUTPUT_NAMES) as store:
        cells = read_cells(config)
        groups = describe(cells, n_typical=config.typical)
        write_effects(store, groups)
        size = write_page(store, groups, cells, title=config.title)
        for group in groups:
            leading = ", ".join(f"{effect.measure.name} {effect.delta:+.2f}" for effect in group.effects[:3])
            logger.info(f"  {group.name} ({group.n_cells:,} cells): {leading}")
        logger.info(f"{len(groups)} groups of {len(cells.groups):,} cells by {cells.model}; look at")
        logger.info(f"  {store.uri}/describe.html ({size / 1e6:.1f} MB; opens without a network)")
    return EXIT_OK


def describe(cells: DescribedCells, *, n_typical: int) -> list[Group]:
    """The groups of cells, the largest first; cells without a group count among the others of each."""
    counts = Counter(name for name in cells.groups if name is not None)
    found = []
    for name, count in sorted(counts.items(), key=lambda each: (-each[1], each[0])):
        inside = cells.groups == name
        chosen = typical(cells.vectors, inside, n_typical)
        effects = effects_of(cells.measures, inside, cells.slides)
        found.append(Group(name, count, effects, cells.images(chosen.tolist())))
    return found


def write_effects(store: Store, groups: list[Group]) -> None:
    """Write effects.csv: a row a group and measure."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(
        [
            "group",
            "measure",
            "unit",
            "cliffs_delta",
            "median",
            "median_of_others",
            "n",
            "n_slides",
            "n_slides_same_sign",
        ]
    )
    for group in groups:
        for effect in group.effects:
            numbers = (f"{value:.6g}" for value in (effect.delta, effect.median, effect.others))
            measure = effect.measure
            counts = (effect.n, effect.n_slides, effect.n_agree)
            writer.writerow([group.name, measure.column, measure.unit, *numbers, *counts])
    store.write_bytes("effects.csv", text.getvalue().encode())
