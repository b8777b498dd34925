"""A picture of each query beside its neighbours, each with its slide and distance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lemon.cells.sheet import COLUMNS, TILE_INCHES, draw_tile, plain, png_of, shortened


@dataclass(frozen=True)
class Neighbours:
    """A query's name and crop, and its neighbours: crops uint8 [60, 60, 3], slides and distances."""

    name: str
    crop: np.ndarray
    crops: list[np.ndarray]
    slides: list[str]
    distances: list[float]


def draw_neighbours(found: list[Neighbours]) -> bytes:
    """A PNG: the query in a block of its own at the left, its neighbours in rows of ten, the nearest first."""
    heights = [max(2, -(-len(each.crops) // COLUMNS)) for each in found]
    width, height = (COLUMNS + 2.4) * TILE_INCHES, sum(heights) * TILE_INCHES * 1.25 + 0.4 * len(found)
    figure = Figure(figsize=(width, height), layout="constrained")
    blocks = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    for block, each, rows in zip(blocks[:, 0], found, heights, strict=True):
        block.suptitle(plain(each.name), fontsize=10, x=0.005, ha="left", parse_math=False)
        grid = block.add_gridspec(rows, COLUMNS + 2)
        draw_tile(block.add_subplot(grid[:2, :2]), each.crop, "query", fontsize=9)
        tiles = zip(each.crops, each.slides, each.distances, strict=True)
        for number, (crop, slide, distance) in enumerate(tiles):
            axis = block.add_subplot(grid[number // COLUMNS, 2 + number % COLUMNS])
            draw_tile(axis, crop, f"{distance:.3f}\n{shortened(slide)}")
    return png_of(figure)
