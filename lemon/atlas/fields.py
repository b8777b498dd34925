"""What an atlas is coloured by: categories (cluster, class, slide, organ, site) and measures of the nucleus."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lemon.cells.morphometry import MEASURES
from lemon.embed.clusters import palette

MISSING = 65_535
"""Code of a cell that has no value."""

MISSING_COLOR = (190, 190, 190)

CATEGORIES = {
    "label": "Class",
    "cluster": "Cluster",
    "foreign_class": "Class as given",
    "organ": "Organ",
    "slide_id": "Slide",
    "site": "Site",
}

_SIGNS = {"um": "µm", "um2": "µm²", "OD/um": "OD/µm", "1/mm2": "/mm²"}


@dataclass(frozen=True)
class Category:
    """``codes`` uint16 [N] point into ``names`` and ``colors``; MISSING for none."""

    key: str
    title: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    codes: np.ndarray


@dataclass(frozen=True)
class Measure:
    """``values`` float32 [N], NaN where unknown; colours go from ``low`` to ``high``, the 1st and 99th percentile."""

    key: str
    title: str
    unit: str
    low: float
    high: float
    values: np.ndarray


def categories_of(table: pa.Table) -> list[Category]:
    """The categories that have a value in the table, in the order in which they are offered."""
    categories = (_category(table, key, title) for key, title in CATEGORIES.items())
    return [category for category in categories if category.names]


def measures_of(table: pa.Table) -> list[Measure]:
    """The measures of the nucleus that the table has for any cell; NaN where it has none."""
    measures = []
    for measure in MEASURES:
        if measure.column not in table.column_names:
            continue
        values = table[measure.column].to_numpy().astype(np.float32)
        known = values[np.isfinite(values)]
        if not len(known):  # distances and density, where only a sample of a slide's nuclei was kept
            continue
        low, high = (float(value) for value in np.percentile(known, (1, 99)))
        title, unit = measure.name.capitalize(), _SIGNS.get(measure.unit, measure.unit)
        measures.append(Measure(measure.column, title, unit, low, high if high > low else low + 1, values))
    return measures


def _category(table: pa.Table, key: str, title: str) -> Category:
    """Names by number for clusters, so that they have QuPath's colours; labels by name, so that the keys that give them
    stay from one round of labelling to the next; else the most frequent first."""
    column = table[key].to_pylist()
    known = [value for value in column if value is not None]
    values, counts = np.unique(np.array(known, dtype=None if known else str), return_counts=True)
    if key == "cluster":
        colors = dict(zip(range(int(values.max()) + 1), palette(int(values.max()) + 1), strict=True)) if known else {}
        ordered = values.tolist()
        shown = tuple(colors[value] for value in ordered)
    else:
        ordered = (values if key == "label" else values[np.argsort(-counts, kind="stable")]).tolist()
        shown = tuple(palette(len(ordered)))
    if len(ordered) >= MISSING:  # a slide a cell; the page's list could not be read either
        return Category(key, title, (), (), np.full(len(column), MISSING, np.uint16))
    number = {value: code for code, value in enumerate(ordered)}
    codes = np.array([number.get(value, MISSING) for value in column], np.uint16)
    return Category(key, title, tuple(str(value) for value in ordered), shown, codes)
