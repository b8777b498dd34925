"""The cells that ``show=`` names, which the page opens with: to be looked at and labelled one after another."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from lemon.errors import ConfigError
from lemon.runtime.identifiers import some
from lemon.runtime.tables import Column, Form, read_user_table

logger = logging.getLogger(__name__)

MAX_LISTED = 1000
"""Cells of a list. Each that is not among the atlas's sample is read on its own, and a person goes through them all."""

_COLUMNS = (Column("cell_id", filled=True), Column("suggested", required=False))


@dataclass(frozen=True)
class Listed:
    """Cell ids in the order of the file, each once, and the classes that its column ``suggested`` names, sorted."""

    ids: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where a cell lies: its row in the tables of its slide."""

    slide_id: str
    row: int


def read_listed(path: str) -> Listed:
    """The list in a CSV or Parquet file. Raises ConfigError where it is none, or too long for a person."""
    columns = read_user_table(path, form=Form("show:", _COLUMNS, others=True)).columns
    ids = tuple(dict.fromkeys(columns["cell_id"]))
    if len(ids) > MAX_LISTED:
        raise ConfigError(f"show: {path} names {len(ids):,} cells; expected at most {MAX_LISTED:,}")
    return Listed(ids, tuple(sorted({name for name in columns.get("suggested", ()) if name is not None})))


def found_of(listed: Listed, places: dict[str, Place], *, path: str, n_cells: int) -> Listed:
    """The list without cells that the table does not have, which are told. Raises ConfigError where it has none."""
    absent = [cell_id for cell_id in listed.ids if cell_id not in places]
    if len(absent) == len(listed.ids):
        raise ConfigError(
            f"show: none of the {len(absent):,} cells of {path} is among the {n_cells:,} embedded ones "
            f"({some(absent)}); expected ids of this cells table, and of slides that are not left out by select"
        )
    if absent:
        line = "show: %d of %d cells of %s are not among the embedded ones and are left out (%s)"
        logger.warning(line, len(absent), len(listed.ids), path, some(absent))
    return Listed(tuple(cell_id for cell_id in listed.ids if cell_id in places), listed.classes)


def to_add(listed: Listed, labelled: dict[str, str], places: dict[str, Place], drawn: dict[str, int]) -> list[Place]:
    """Cells that are not drawn but belong into the atlas: those of the list, and labelled ones, so that an export has
    all labels.

    Args:
        listed: cells that there are.
        labelled: label of each cell that has one.
        places: of the cells.
        drawn: slide -> how many of its first rows the atlas has anyway.
    """

    def beyond(ids: tuple[str, ...]) -> set[Place]:
        found = {places[cell_id] for cell_id in ids if cell_id in places}
        return {place for place in found if place.row >= drawn.get(place.slide_id, 0)}

    wanted, others = beyond(listed.ids), beyond(tuple(labelled))
    if len(others) > MAX_LISTED:
        logger.warning("labels: %d labelled cells are not among the atlas's, and not in what it exports", len(others))
        others = set()
    return sorted(wanted | others, key=lambda place: (place.slide_id, place.row))
