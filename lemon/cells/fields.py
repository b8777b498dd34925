"""The tissue around cells, cut from their slides: what a cells table, whose images have 15 um, does not hold."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa

from lemon.cells.crop import corners_of, cut_crops
from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import Part, Selection
from lemon.errors import ConfigError, FatalError
from lemon.runtime.identifiers import some
from lemon.runtime.scratch import scratch_folder
from lemon.schema import CELL_BYTES, CELL_MPP, CELL_PX, VIEW_PX, SlideRow
from lemon.slides.errors import RegionError, SlideError
from lemon.slides.local import local_slide
from lemon.slides.reader import SlideReader
from lemon.slides.source import changed_sources, size_and_time

BLOCK_PX = 2048
"""Side at 0.25 um/px of what is read of a slide at once, but for the margin that fields reach over: 12 MB."""

PX_AT_A_TIME = 256 * 224**2
"""Pixels of the fields that are in memory at once: 39 MB."""

PLACE = ["x_level0_px", "y_level0_px", "mpp"]
"""Columns of the cells table that say where a cell lies."""


@dataclass(frozen=True)
class SlideFields:
    """Images of a slide's cells at another scale than the table's: a view of them shows a square of ``um``."""

    slide: SlideRow
    um: float


def with_fields(selection: Selection, *, um: float) -> Selection:
    """The same cells, whose images are cut from the slides so that a view shows ``um``. Raises ConfigError where a
    slide is gone or is another file than its cells were cut from."""
    known = {row.slide_id: row for row in rows_with_cells(selection.store)}
    slides = [known[part.slide_id] for part in selection.parts]
    gone = {row.slide_id for row in slides if size_and_time(row.path) is None}
    changed = changed_sources(slides, {row.slide_id: row.path for row in slides})
    for problem, names in (("not there", gone), ("other files", changed)):
        if names:
            raise ConfigError(
                f"field_um: {len(names)} of {len(slides)} slides ({some(sorted(names))}) are {problem}, as "
                f"{known[min(names)].path}; expected those that the cells were cut from"
            )
    parts = zip(selection.parts, slides, strict=True)
    return replace(selection, parts=tuple(replace(part, fields=SlideFields(slide, um)) for part, slide in parts))


def field_images(selection: Selection, part: Part, *, first: int, last: int | None, rows: int) -> Generator[np.ndarray]:
    """Fields of a part's cells from row ``first`` to ``last`` (exclusive; None: all), uint8 [n <= rows, 60, 60, 3].

    As a cell's image does, they reach half as far again as a view. They wait on the scratch disk, as a slide is read
    from place to place. Raises ConfigError where it cannot be, FatalError where the disk is full, ShardError.
    """
    assert part.fields is not None
    slide, side_px = part.fields.slide, round(part.fields.um / CELL_MPP * CELL_PX / VIEW_PX)
    batches = list(selection.batches(part, PLACE, first=first, last=last))
    if not any(map(len, batches)):
        return
    with scratch_folder() as folder:
        path = folder / "fields"
        try:
            with path.open("wb") as stream:
                for at, fields in cut_fields(slide.path, batches, side_px=side_px):
                    for row, field in zip(at.tolist(), fields, strict=True):
                        stream.seek(row * CELL_BYTES)
                        stream.write(cv2.resize(field, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA).data)
        except (SlideError, RegionError) as error:
            raise ConfigError(
                f"field_um: {slide.slide_id}: {slide.path}: {error}; leave the slide out with select.slides"
            ) from None
        except OSError as error:
            raise full_scratch_error(path, "fields", error) from None
        images = np.memmap(path, np.uint8, "r").reshape(-1, CELL_PX, CELL_PX, 3)
        for start in range(0, len(images), rows):
            yield images[start : start + rows]


def cut_fields(
    path: str, batches: Sequence[pa.RecordBatch], *, side_px: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Squares of a slide around its cells, in the order of their places, and which rows [n] they are of.

    Args:
        path: of the slide, local or at s3://.
        batches: of the cells, with the columns PLACE.
        side_px: of a square at 0.25 um/px; it is white where the slide ends.

    Yields rows int [n] and uint8 [n, side, side, 3]. Raises SlideError and RegionError.
    """
    mpp = float(batches[0]["mpp"][0].as_py())
    corner = corners_of(place_um(batches) / CELL_MPP - 0.5, side_px=side_px)  # level-0 to base px: crop.to_level0
    blocks, owner = np.unique(corner // BLOCK_PX, axis=0, return_inverse=True)
    by_block = np.split(np.argsort(owner.ravel(), kind="stable"), np.cumsum(np.bincount(owner.ravel()))[:-1])
    size, at_a_time = BLOCK_PX + side_px, max(1, PX_AT_A_TIME // side_px**2)
    with local_slide(path) as local, SlideReader(local, mpp=mpp) as reader:
        for (x_px, y_px), of_block in zip((blocks * BLOCK_PX).tolist(), by_block, strict=True):
            block = reader.region(x_px, y_px, width_px=size, height_px=size)
            for start in range(0, len(of_block), at_a_time):
                rows = of_block[start : start + at_a_time]
                yield rows, cut_crops(block, corner[rows] - (x_px, y_px), side_px=side_px)


def place_um(batches: Sequence[pa.RecordBatch]) -> np.ndarray:
    """Places of cells in um: float64 [N, 2]."""
    parts = [
        np.stack([batch["x_level0_px"].to_numpy(), batch["y_level0_px"].to_numpy()], axis=1)
        * batch["mpp"].to_numpy()[:, None]
        for batch in batches
    ]
    return np.concatenate([np.empty((0, 2)), *parts])


def full_scratch_error(path: Path, what: str, error: OSError) -> FatalError:
    """That a file in a scratch folder cannot be written: every slide would meet that."""
    return FatalError(f"cannot keep {what} in {path.parent.parent}: {error}; TMPDIR=... names another folder")
