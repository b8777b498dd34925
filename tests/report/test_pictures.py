"""Which nuclei are shown."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import shapely

from lemon.cells.shard import images_to_arrow
from lemon.report.pictures import ordinary_cells, ordinary_outlines
from tests.cells_table import synthetic_crops


def test_ordinary_outlines_are_of_ordinary_size_and_smooth() -> None:
    nucleus, speck, blot = (shapely.Point(0, 0).buffer(radius) for radius in (14, 4, 40))  # px of 0.25 um
    flake = nucleus.difference(shapely.box(-2, -20, 20, 20))
    ragged = shapely.union(flake, shapely.box(-14, -1, 14, 1))
    outlines = [nucleus, speck, blot, ragged]
    assert ordinary_outlines(outlines, mpp=0.25).tolist() == [True, False, False, False]
    assert ordinary_outlines(outlines, mpp=0.5).tolist() == [False, False, False, False]


def test_cells_to_show_are_the_ordinary_dark_sharp_ones_of_lowest_rank() -> None:
    images = np.repeat(synthetic_crops(1, seed=0), 6, axis=0)
    images[4] = images[4].mean(axis=(0, 1)).astype(np.uint8)  # blurred away
    images[:, 0, 0, 0] = range(6)  # a mark
    columns = {
        "rank": [0.9, 0.1, 0.2, 0.3, 0.4, 0.5],
        "area_um2": [40.0, 10.0, 40.0, 40.0, 40.0, 40.0],
        "solidity": [0.95, 0.95, 0.5, 0.95, 0.95, 0.95],
        "hematoxylin_od_mean": [0.6, 0.9, 0.9, 0.2, 0.8, 0.7],
    }
    cells = pa.table(columns | {"image": images_to_arrow(images)})
    shown = ordinary_cells(cells, count=3)
    # Ordinary are 0, 3, 4, 5; of these 4 and 5 are darker, and 4 is not sharp; then any cells, by rank.
    assert shown[:, 0, 0, 0].tolist() == [5, 1, 2]
