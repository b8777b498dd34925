"""The points of a study: the pretraining job of each, and what a table lacks for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import Selection, rank_of, select_cells
from lemon.errors import ConfigError
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.sweep.config import Point, SweepConfig


class PointFaults:
    """Faults by point; one that all points share is listed once."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._points_by_line: dict[str, list[str]] = {}

    def add(self, point: Point, *lines: str) -> None:
        """Note faults of a point, each once."""
        for line in lines:
            points = self._points_by_line.setdefault(line, [])
            if point.name not in points:
                points.append(point.name)

    def lines(self) -> list[str]:
        """One line a fault, with the points that have it."""
        everywhere = len(self._names)
        return [
            f"pretrain.{line}" if len(points) == everywhere else f"point {', '.join(points)}: pretrain.{line}"
            for line, points in self._points_by_line.items()
        ]


def nested_organs(cells: Store) -> list[str]:
    """Organs of a table by the rank of their name: the first k are in every choice of more than k.

    Raises ConfigError for a table without cells.
    """
    names = sorted({row.organ for row in rows_with_cells(cells) if row.organ is not None})
    return [names[index] for index in np.argsort(rank_of(names), kind="stable")]


def point_config(config: SweepConfig, point: Point, *, organs: Sequence[str]) -> PretrainConfig:
    """The pretraining job of a point. Raises ConfigError with a line a fault.

    Later ones win: the variant's, the study's, the sweep's ``pretrain.*``, then the point's own. Trials go to MLflow's
    registry only where one of these says so.
    """
    fixed = {"cells": config.cells, "data": config.data, "output": "unset"}
    unless_asked = {"register_as": None}
    layers = (unless_asked, config.sweep.overrides, config.pretrain, point.overrides, fixed)
    overrides = [part for layer in layers for part in (layer if isinstance(layer, list) else [layer])]
    pretrain = load("pretrain", overrides, PretrainConfig)
    if point.n_organs is None:
        return pretrain
    among = [organ for organ in organs if pretrain.select.organs is None or organ in pretrain.select.organs]
    if len(among) < point.n_organs:
        got = f"got {point.n_organs} organs; the table has {len(among)} ({', '.join(among) or 'none at all'})"
        raise ConfigError(f"select.organs: {got}")
    chosen = pretrain.select.model_copy(update={"organs": among[: point.n_organs]})
    return pretrain.model_copy(update={"select": chosen})


def cached_select(cells: Store) -> Callable[..., Selection]:
    """``select_cells`` of a table that does a selection once: many points have the same one."""
    known: dict[str, Selection] = {}

    def select(**options: Any) -> Selection:
        key = repr(options)
        if key not in known:
            known[key] = select_cells(cells, **options)
        return known[key]

    return select


def selection_faults(config: PretrainConfig, select: Callable[..., Selection]) -> list[str]:
    """What the table lacks for a point to be what its name says. Reads the ledger, no shard."""
    select_config = config.select
    if config.field_um is not None:
        return [f"field_um: got {config.field_um:g}; expected null: a sweep scores encoders on images of nuclei"]
    try:
        all_cells = select(**select_config.model_dump() | {"n_cells": None})
    except ConfigError as error:
        return [str(error)]
    n_slides = len(all_cells.parts)
    if select_config.n_slides is not None and n_slides < select_config.n_slides:
        return [f"select.n_slides: got {select_config.n_slides:,}; the table has {n_slides:,} slides to choose from"]
    if select_config.n_cells is not None and all_cells.n_cells < select_config.n_cells:
        remedy = "choose fewer, or curate with more cells_per_slide"
        got, available = select_config.n_cells, all_cells.n_cells
        return [f"select.n_cells: got {got:,}; the {n_slides:,} slides hold {available:,}: {remedy}"]
    return []
