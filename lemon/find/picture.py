"""A picture of each query beside its neighbours, each with its slide and distance."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from lemon.runtime.secrets import redacted

COLUMNS = 10
_TILE_INCHES = 1.1
_MAX_NAME = 16


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
    width, height = (COLUMNS + 2.4) * _TILE_INCHES, sum(heights) * _TILE_INCHES * 1.25 + 0.4 * len(found)
    figure = Figure(figsize=(width, height), layout="constrained")
    blocks = figure.subfigures(len(found), 1, height_ratios=heights, squeeze=False)
    for block, each, rows in zip(blocks[:, 0], found, heights, strict=True):
        block.suptitle(_plain(each.name), fontsize=10, x=0.005, ha="left", parse_math=False)
        grid = block.add_gridspec(rows, COLUMNS + 2)
        query = block.add_subplot(grid[:2, :2])
        query.imshow(each.crop)
        query.set_xlabel("query", fontsize=9)
        tiles = zip(each.crops, each.slides, each.distances, strict=True)
        axes = [query]
        for number, (crop, slide, distance) in enumerate(tiles):
            axis = block.add_subplot(grid[number // COLUMNS, 2 + number % COLUMNS])
            axis.imshow(crop)
            axis.set_xlabel(f"{distance:.3f}\n{shortened(slide)}", fontsize=6.5, parse_math=False)
            axes.append(axis)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def shortened(name: str) -> str:
    """A name's beginning and end, where it is long: TCGA's slides differ in both."""
    name = _plain(name)
    half = _MAX_NAME // 2
    return name if len(name) <= _MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _plain(text: str) -> str:
    return redacted(" ".join(text.split()))
