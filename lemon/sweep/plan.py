"""``plan=true``: what a sweep would do and need, from its settings and the table's ledger. Starts and writes nothing.

Imports neither torch, Ray nor MLflow. Of the table only the ledger is read, so cells a slide, nuclei and organs are
known and images are not looked at. Without a table (yet) the plan says what to curate.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lemon.cells.ledger import read_ledger
from lemon.cells.select import Selection
from lemon.errors import EXIT_BAD_CONFIG, EXIT_OK, ConfigError
from lemon.pretrain.config import PretrainConfig
from lemon.pretrain.exclude import Excluded, find_excluded
from lemon.pretrain.rates import checkpoint_bytes, rates_of
from lemon.probe.tasks.catalogue import CURATED
from lemon.runtime.console import stage_logger
from lemon.runtime.store import Store, is_uri, path_exists
from lemon.schema import CELL_BYTES, SlideRow
from lemon.sweep.config import Point, SweepConfig
from lemon.sweep.points import PointFaults, cached_select, nested_organs, point_config, selection_faults

logger = stage_logger(__name__, "sweep")

GB = 1e9


@dataclass(frozen=True)
class PointPlan:
    """A point: its job, the slides that it takes, and what the table lacks for it."""

    point: Point
    config: PretrainConfig | None
    """None where the settings are wrong."""
    rows: list[SlideRow]
    """Of its slides, in the ledger; empty where there is no table."""
    faults: list[str]

    @property
    def n_slides(self) -> int | None:
        """Slides that it takes; None where neither settings nor table say."""
        wanted = self.config.select.n_slides if self.config else None
        return wanted or len(self.rows) or None

    @property
    def n_cells(self) -> int | None:
        """Cells that it takes; None where neither settings nor table say."""
        wanted = self.config.select.n_cells if self.config else None
        return wanted or sum(row.n_cells for row in self.rows) or None

    @property
    def cells_a_slide(self) -> int | None:
        """Cells that it needs of a slide on average; None for all that there are."""
        wanted = self.config.select.n_cells if self.config else None
        return math.ceil(wanted / self.n_slides) if wanted and self.n_slides else None


@dataclass(frozen=True)
class Need:
    """Room on a disk."""

    what: str
    key: str
    place: str
    size: int

    @property
    def free(self) -> int | None:
        """Bytes that are free there; None at s3://."""
        if is_uri(self.place):
            return None
        path = Path(self.place).expanduser().absolute()
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free

    def __str__(self) -> str:
        free = "" if self.free is None else f"; {self.free / GB:,.1f} GB are free"
        return f"{self.what}: {self.size / GB:,.1f} GB in {self.place}{free}"


def main(config: SweepConfig) -> int:
    """Log the plan; returns 0 where all of it fits, else 2. Raises ConfigError where ``cells`` is no path."""
    try:
        cells = Store(config.cells)
    except ValueError as error:
        raise ConfigError(f"cells: {error}") from None
    rows = [row for row in SlideRow.read(read_ledger(cells)) if row.status != "failed" and row.n_cells]
    excluded = Excluded(benchmarks=[])
    if rows:
        excluded = find_excluded(config.exclude_benchmarks, tasks=config.tasks, data=config.data, cells=cells)
    plans = list(_points(config, cells, rows, excluded))
    needs, seeds = _needs(config, plans), config.all_seeds
    logger.info(
        f"plan of {config.sweep.name}: {len(plans)} points with seeds {', '.join(map(str, seeds))} are "
        f"{len(plans) * len(seeds)} trials; nothing is started"
    )
    logger.info(_table_line(config, rows))
    if excluded.line:
        logger.info(excluded.line)
    tables = [_organs_table(rows)] if rows else []
    for text in (*tables, _points_table(plans), *_recipe_lines(plans, len(seeds))):
        logger.info(text)
    faults = [*_faults(config, plans, needs)]
    for line in (*map(str, needs), *(f"does not fit: {fault}" for fault in faults)):
        logger.info(line)
    for remedy in _remedies(config, plans, rows) if faults or not rows else ():
        logger.info(f"to change: {remedy}")
    if not faults and rows:
        logger.info("all of it fits; the same command without plan=true begins")
    return EXIT_BAD_CONFIG if faults or not rows else EXIT_OK


def _points(config: SweepConfig, cells: Store, rows: list[SlideRow], excluded: Excluded) -> Iterator[PointPlan]:
    by_id, select = {row.slide_id: row for row in rows}, cached_select(cells)
    # Without a table any organs will do: how many a point wants is in its settings.
    organs = nested_organs(cells) if rows else [f"organ {number}" for number in range(1000)]
    for point in config.sweep.points:
        try:
            pretrain = excluded.of(point_config(config, point, organs=organs))
        except ConfigError as error:
            yield PointPlan(point, None, [], str(error).splitlines())
            continue
        chosen, faults = _slides_of(pretrain, select) if rows else ([], [])
        yield PointPlan(point, pretrain, [by_id[slide_id] for slide_id in chosen], faults)


def _slides_of(config: PretrainConfig, select: Callable[..., Selection]) -> tuple[list[str], list[str]]:
    """The slides of a point, and what they lack."""
    faults = selection_faults(config, select)
    if faults and "n_cells" not in faults[0]:
        return [], faults
    parts = select(**config.select.model_dump() | {"n_cells": None}).parts
    return [part.slide_id for part in parts], faults


# --- what is needed ---------------------------------------------------------------------------------------------------


def _needs(config: SweepConfig, plans: Sequence[PointPlan]) -> list[Need]:
    """Room for images, which selections of the same slides share, and for checkpoints and encoders of all trials."""
    caches: dict[tuple[str, frozenset[str] | str], int] = {}
    kept = 0
    for plan in plans:
        if plan.config is None:
            continue
        slides = frozenset(row.slide_id for row in plan.rows) or repr(plan.config.select)
        place = plan.config.cache, slides
        caches[place] = max(caches.get(place, 0), (plan.n_cells or 0) * CELL_BYTES)
        copies = plan.config.keep_checkpoints + (plan.config.probe is not None)  # the best one beside the newest
        kept += len(config.all_seeds) * copies * checkpoint_bytes(plan.config)
    by_folder = {folder: sum(size for key, size in caches.items() if key[0] == folder) for folder, *_ in caches}
    images = [
        Need("uncompressed images, on each node that trains", "pretrain.cache", folder, size)
        for folder, size in by_folder.items()
        if size
    ]
    return [*images, Need("checkpoints, about", "output", config.output, kept)]


def _recipe_lines(plans: Sequence[PointPlan], n_seeds: int) -> Iterator[str]:
    """Each kind of run with the points that have it, and the hours of all by each device that was measured."""
    points: dict[str, list[str]] = {}
    hours: dict[str, dict[str, float]] = {}
    counted: dict[str, list[str]] = {}
    for plan in plans:
        if (config := plan.config) is None:
            continue
        images = config.total_steps * config.batch
        recipe = (
            f"{config.encoder.name}, {config.ssl.label}, {config.epochs:g} epochs, {images:,} images in "
            f"{config.total_steps:,} steps of {config.batch:,}, warmup {config.ssl.warmup_epochs:.3g} epochs"
        )
        points.setdefault(recipe, []).append(plan.point.name)
        for rate in rates_of(config):
            by_basis = hours.setdefault(rate.device, {})
            by_basis[rate.basis] = by_basis.get(rate.basis, 0) + n_seeds * rate.hours(images)
            counted.setdefault(rate.device, []).append(plan.point.name)
    for recipe, names in points.items():
        yield f"each trial of {', '.join(names)}: {recipe}"
    for device, by_basis in hours.items():
        some = f" of {', '.join(counted[device])} alone" if len(counted[device]) < len(plans) else ""
        total = sum(by_basis.values())
        yield f"pretraining{some} on one {device}: {total:,.1f} hours, probes not counted; rates of:"
        yield from (f"  {each:,.1f} h: {basis}" for basis, each in by_basis.items())
    if not hours:
        yield "pretraining: no rate of such a method was measured"


# --- tables -----------------------------------------------------------------------------------------------------------


def _table_line(config: SweepConfig, rows: Sequence[SlideRow]) -> str:
    if not rows:
        return f"cells: {config.cells} holds no cells yet; this is what a table needs"
    return f"cells: {config.cells}: {_cells(rows)}"


def _cells(rows: Sequence[SlideRow]) -> str:
    counts = np.array([row.n_cells for row in rows])
    spread = f"{counts.min():,} to {counts.max():,} a slide, {np.median(counts):,.0f} in the middle"
    return f"{counts.sum():,} cells of {len(rows):,} slides ({spread}), of {sum(map(_nuclei, rows)):,} nuclei"


def _nuclei(row: SlideRow) -> int:
    """Nuclei that were found in a slide: what curation could keep."""
    return max(row.n_nuclei or 0, row.n_cells)


def _organs_table(rows: Sequence[SlideRow]) -> str:
    """Slides, cells and cells a slide of each organ."""
    by_organ: dict[str, list[int]] = {}
    for row in rows:
        by_organ.setdefault(row.organ or "(none)", []).append(row.n_cells)
    lines = [
        (organ, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,}", f"{sum(counts) / len(counts):,.0f}")
        for organ, counts in sorted(by_organ.items())
    ]
    return _aligned([("organ", "slides", "cells", "least a slide", "mean a slide"), *lines])


def _points_table(plans: Sequence[PointPlan]) -> str:
    """What each point needs of a slide, and what the table has."""
    lines = []
    for plan in plans:
        counts = [row.n_cells for row in plan.rows]
        has = f"{sum(counts) / len(counts):,.0f}" if counts else "-"
        fits = "no" if plan.faults else "yes" if counts else "-"
        lines.append((plan.point.name, *map(_number, (plan.n_slides, plan.n_cells, plan.cells_a_slide)), has, fits))
    return _aligned([("point", "slides", "cells", "needs a slide", "has a slide", "fits"), *lines])


def _number(value: int | None) -> str:
    return "all" if value is None else f"{value:,}"


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns below each other, the first to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines
    )


# --- what to change ---------------------------------------------------------------------------------------------------


def _faults(config: SweepConfig, plans: Sequence[PointPlan], needs: Sequence[Need]) -> Iterator[str]:
    """A line for each thing that does not fit."""
    faults = PointFaults([plan.point.name for plan in plans])
    for plan in plans:
        faults.add(plan.point, *plan.faults)
    yield from faults.lines()
    if not path_exists(config.data) and not all(task.startswith(tuple(CURATED)) for task in config.tasks):
        yield f"data: {config.data} not found; the tasks lie in folders below it"
    for need in needs:
        if need.free is not None and need.free < need.size:
            yield f"{need.key}: {need}; choose another folder, or fewer cells, points or seeds"


def _remedies(config: SweepConfig, plans: Sequence[PointPlan], rows: Sequence[SlideRow]) -> Iterator[str]:
    """What would fit: another curation, or less of the study."""
    if not rows:
        yield from _curation_of_nothing(plans)
    elif any(plan.faults for plan in plans):
        yield from _curation(plans, rows)
        yield from _smaller(config, plans)


def _curation_of_nothing(plans: Sequence[PointPlan]) -> Iterator[str]:
    """What to curate where there is no table."""
    slides = max((plan.n_slides or 0 for plan in plans), default=0)
    a_slide = max((plan.cells_a_slide or 0 for plan in plans), default=0)
    wanted = [plan.config.select.n_cells or 0 for plan in plans if plan.config]
    organs = max((plan.point.n_organs or 1 for plan in plans), default=1)
    cells = max(wanted, default=0)
    what = f"{slides:,} slides" if slides else f"slides with {cells:,} cells in all" if cells else "slides"
    of_organs = f" of {organs} organs" if organs > 1 else ""
    limit = f" with cells_per_slide={_round_up(a_slide)} or more" if a_slide else ""
    yield f"curate {what}{of_organs}{limit}"


def _curation(plans: Sequence[PointPlan], rows: Sequence[SlideRow]) -> Iterator[str]:
    """How many cells a slide would do, by the nuclei that were found: one number for all points that lack cells."""
    limits = {}
    for plan in plans:
        if plan.faults and plan.rows and plan.config and plan.config.select.n_cells:
            nuclei = np.array([_nuclei(row) for row in plan.rows])
            limits[plan.point.name] = _least_limit(nuclei, plan.config.select.n_cells)
    if enough := [limit for limit in limits.values() if limit is not None]:
        limit = _round_up(max(enough))
        size = sum(min(_nuclei(row), limit) for row in rows) * CELL_BYTES
        yield f"curate into another output with cells_per_slide={limit}: {size / GB:,.1f} GB of cells"
    if lacking := [name for name, limit in limits.items() if limit is None]:
        yield f"point {', '.join(lacking)}: all nuclei of its slides are too few; only fewer cells or more slides help"


def _smaller(config: SweepConfig, plans: Sequence[PointPlan]) -> Iterator[str]:
    """Which points fit as the table is, and with how many cells all whose slides are there would."""
    fitting = [plan.point for plan in plans if not plan.faults]
    if fitting and config.sweep.axis:
        yield f"sweep.points={','.join(point.value for point in fitting)}, which fit"
    elif fitting:
        yield f"a study of the points that fit: {', '.join(point.name for point in fitting)}"
    there = [plan for plan in plans if plan.rows and plan.config and plan.config.select.n_cells]
    if config.sweep.axis != "select.n_cells" and any(plan.faults for plan in there):
        most = _round_down(min(sum(row.n_cells for row in plan.rows) for plan in there))
        yield f"pretrain.select.n_cells={most}, which all points with enough slides have"


def _least_limit(nuclei: np.ndarray, wanted: int) -> int | None:
    """The least k for which slides of so many nuclei give ``wanted`` cells at k a slide; None where none does."""
    if nuclei.sum() < wanted:
        return None
    rising = np.sort(nuclei)
    # With k between two counts, the slides below keep all that they have and the others k each.
    left = len(rising) - np.arange(len(rising))
    limits = np.ceil((wanted - np.concatenate([[0], rising.cumsum()[:-1]])) / left)
    return int(limits[np.argmax(limits <= rising)])


def _round_up(value: int) -> int:
    """To two digits: what is measured on other slides is never exact."""
    step = 10 ** max(0, len(str(value)) - 2)
    return math.ceil(value / step) * step


def _round_down(value: int) -> int:
    step = 10 ** max(0, len(str(value)) - 2)
    return value // step * step
