"""Sheets of cells: single crops of a cells table, and pictures of many with a caption each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lemon.cells.names import shard_name
from lemon.cells.shard import images_from_arrow
from lemon.errors import ConfigError
from lemon.runtime.secrets import redacted
from lemon.runtime.shards import ShardError, read_shard
from lemon.runtime.store import Store
from lemon.schema import CELLS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 10
TILE_INCHES = 1.1
_MAX_NAME = 16


def crop_of_cell(cells: Store, slide_id: str, row: int, *, cell_id: str) -> np.ndarray:
    """The image of a cell, uint8 [60, 60, 3], by its row in its slide. Raises ConfigError where another cell is."""
    columns = ["cell_id", "image"]
    try:
        batch = next(
            read_shard(cells, shard_name(slide_id), schema=CELLS, columns=columns, first=row, batch_rows=16), None
        )
    except ShardError as error:
        raise ConfigError(f"cells: {cells.uri}/{error}") from None
    if batch is None or batch["cell_id"][0].as_py() != cell_id:
        raise ConfigError(f"cells: {cells.uri} has other cells of {slide_id} than were embedded; embed it again")
    return images_from_arrow(batch["image"])[0].copy()


def draw_sheet(crops: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """A PNG of crops uint8 [60, 60, 3] in rows of ten, each over its caption."""
    from matplotlib.figure import Figure  # a second to import

    rows = -(-len(crops) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * TILE_INCHES, rows * TILE_INCHES * 1.35), layout="constrained")
    for number, (crop, caption) in enumerate(zip(crops, captions, strict=True)):
        draw_tile(figure.add_subplot(rows, COLUMNS, number + 1), crop, caption)
    return png_of(figure)


def draw_tile(axis: Axes, crop: np.ndarray, caption: str, *, fontsize: float = 6.5) -> None:
    """A crop over its caption."""
    axis.imshow(crop)
    axis.set_xlabel(caption, fontsize=fontsize, parse_math=False)
    axis.set(xticks=[], yticks=[])


def png_of(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()


def shortened(name: str) -> str:
    """A name's beginning and end, where it is long: TCGA's slides differ in both."""
    name = plain(name)
    half = _MAX_NAME // 2
    return name if len(name) <= _MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def plain(text: str) -> str:
    """Text of the user's as a picture shows it: in one line, and without secrets."""
    return redacted(" ".join(text.split()))
