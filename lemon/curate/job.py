"""Slides -> nuclei -> cells on Ray Data: a slide a row, in a pool of actors that each commit what they finish."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

from lemon.cells.ledger import cells_ledger
from lemon.cells.names import FOLDERS, SETTINGS, geojson_name, shard_name
from lemon.curate.config import CurateConfig
from lemon.curate.processes import WorkerProcesses
from lemon.curate.slide import FetchedSlide, OutputError, curate_slide, fetch_slide
from lemon.curate.survey import Survey, survey_file
from lemon.errors import ConfigError
from lemon.nuclei.config import AutoConfig
from lemon.nuclei.given.config import CellsFrom
from lemon.runtime import pool
from lemon.runtime.console import stage_logger
from lemon.runtime.demand import Demand, allocate, has_gpus, is_new_output
from lemon.runtime.identifiers import file_stem
from lemon.runtime.lease import hold
from lemon.runtime.ledger import Ledger, Summary
from lemon.runtime.secrets import redacted
from lemon.runtime.store import READERS, Store, fingerprint, is_uri, path_exists
from lemon.schema import SlideRow
from lemon.slides.cohort import Slide, list_slides
from lemon.slides.source import changed_masks, changed_sources, size_and_time

OUTPUT_NAMES = (*FOLDERS, SETTINGS)
"""What curation writes in its output."""

logger = stage_logger(__name__, "curate")

Locate = Callable[[Slide], contextlib.AbstractContextManager[str]]
"""Makes a slide's file be there for the length of a block, and says where. Raises pool.AbsentError."""


@dataclass(frozen=True)
class SlideAccess:
    """Where the actors find the slides.

    Attributes:
        open: makes what locates them, in each actor; has to be picklable.
        ahead: slides that an actor locates while it curates another.
    """

    open: Callable[[], Locate]
    ahead: int


def _locate_in_place() -> Locate:
    return lambda slide: contextlib.nullcontext(slide.path)


IN_PLACE = SlideAccess(open=_locate_in_place, ahead=0)


def run(
    config: CurateConfig, *, source: SlideAccess = IN_PLACE, slides: list[Slide] | None = None
) -> Summary[SlideRow]:
    """Curate the slides of a config; logs and returns what became of each.

    A slide that its source could not provide gets no row, so that it is tried again by a rerun. ``slides`` is what
    ``check_and_allocate`` returned where a larger job called it already.

    Raises ConfigError for what the user must correct first; FatalError when the job cannot go on.
    """
    slides = check_and_allocate(config) if slides is None else slides
    with hold(config.output, stage="curate", names=OUTPUT_NAMES) as store:
        config = with_segmenter(config, log=True)
        ledger = open_ledger(store, config)
        rows = list(ledger.rows().values())
        pending = _pending(slides, rows, ledger=ledger, config=config)
        if pending:
            _curate_all(pending, config=config, ledger=ledger, source=source)
            rows = list(ledger.rows().values())
    wanted = {slide.slide_id for slide in slides}
    summary = Summary(
        rows=[row for row in rows if row.slide_id in wanted],
        n_skipped=len(slides) - len(pending),
        max_failed_share=config.max_failed_share,
    )
    n_nuclei, n_cells = sum(row.n_nuclei or 0 for row in summary.rows), sum(row.n_cells for row in summary.rows)
    totals = f"{n_nuclei:,} nuclei, {n_cells:,} cells in {config.output}"
    logger.info(f"{summary.log_and_describe(logger)}, {totals}")
    worked_on = {slide.slide_id for slide in pending}
    if speed := _describe_speed([row for row in summary.rows if row.slide_id in worked_on]):
        logger.info(speed)
    return summary


def _describe_speed(rows: list[SlideRow]) -> str:
    """What the slides of a run took, in words; empty where none had tissue."""
    area_mm2, seconds = sum(row.area_mm2 or 0 for row in rows), sum(row.total_s or 0 for row in rows)
    if not area_mm2 or not seconds:
        return ""
    device_share, peak_mib = sum(row.network_s or 0 for row in rows) / seconds, max(row.peak_mib or 0 for row in rows)
    return (
        f"{area_mm2:,.1f} mm2 at {seconds / area_mm2:.2f} s/mm2 of an actor, {device_share:.0%} of it in the network; "
        f"an actor's peak memory {peak_mib / 1024:.1f} GiB"
    )


def main(config: CurateConfig) -> int:
    """``run``; returns the exit code."""
    return run(config).exit_code


@dataclass(frozen=True)
class LocatedSlide:
    """A slide, where its file is now, and, in an actor, its local file."""

    slide: Slide
    path: str
    fetched: FetchedSlide | None = None

    @property
    def slide_id(self) -> str:
        """By which its attempts are counted."""
        return self.slide.slide_id


class Curator(pool.Worker[LocatedSlide, SlideRow]):
    """Curates one slide at a time; holds the segmenter and the worker processes."""

    stage = "curate"
    fatal = (OutputError,)

    def __init__(
        self,
        config: CurateConfig,
        *,
        ledger: Ledger[SlideRow],
        source: SlideAccess = IN_PLACE,
        surveys_ahead: bool = False,
    ) -> None:
        self.config, self.locate = config, source.open()
        self.ledger = ledger
        self.segmenter = config.segmenter.build() if config.cells_from is None else None
        self.processes: Executor = WorkerProcesses(config.workers.cpus, of=curate_slide)
        self.surveyor = WorkerProcesses(1, of=survey_file) if surveys_ahead else None
        self.free_since_s = time.perf_counter()

    @contextlib.contextmanager
    def ready(self, item: LocatedSlide) -> Iterator[LocatedSlide]:
        """The slide with its file, fetched and looked at while another is curated, where that is wanted."""
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(self.locate(item.slide))
            fetched = stack.enter_context(fetch_slide(replace(item.slide, path=path), config=self.config))
            if self.surveyor is not None and fetched.error is None:
                fetched = replace(fetched, survey=self._survey(fetched.path, item.slide))
            yield replace(item, path=path, fetched=fetched)

    def _survey(self, path: str, slide: Slide) -> Survey | None:
        """What a slide looks like, seen by another process: a file that kills it is counted when its turn comes."""
        assert self.surveyor is not None
        try:
            return self.surveyor.submit(survey_file, path, slide, self.config).result()
        except BrokenProcessPool:
            self.surveyor = WorkerProcesses(1, of=survey_file)
        except Exception:  # in its turn it is raised again
            logger.debug("%s", path, exc_info=True)
        return None

    def work(self, item: LocatedSlide) -> SlideRow:
        """Curate a slide and commit it."""
        # What could not be fetched ahead, as there was no room beside the slide before, is tried again in its turn.
        fetched = None if item.fetched is None or item.fetched.error else item.fetched
        try:
            row = curate_slide(
                replace(item.slide, path=item.path),
                config=self.config,
                segmenter=self.segmenter,
                processes=self.processes,
                store=self.ledger.store,
                fetched=fetched,
                free_since_s=self.free_since_s,
            )
        except BrokenProcessPool as error:
            self.processes = WorkerProcesses(self.config.workers.cpus, of=curate_slide)
            raise pool.CrashError from error
        self.device_s += row.network_s or 0.0
        self.free_since_s = time.perf_counter()
        return self.ledger.commit(replace(row, path=item.slide.path))

    def fail(self, item: LocatedSlide, reason: str) -> SlideRow:
        """Give a slide up."""
        error = " ".join(redacted(reason).split())
        return self.ledger.commit(SlideRow(**vars(item.slide), status="failed", n_cells=0, error=error))


def check_and_allocate(config: CurateConfig, *, key: str = "workers") -> list[Slide]:
    """Check a config and, where there is work, what it asks of the cluster; returns the slides.

    ``key`` is what its ``workers`` are called where it is a part of another job's. Raises ConfigError.
    """
    slides = check(config)
    if is_new_output(config.output, table="slides"):
        Store(config.output).records.require_all(OUTPUT_NAMES)  # before a cluster is asked for
        allocate(_demand(with_segmenter(config), n_slides=len(slides), key=key), stage="curate")
    return slides


def with_segmenter(config: CurateConfig, *, log: bool = False) -> CurateConfig:
    """A config whose segmenter is named: for ``auto`` that of the output, or of a new one by whether there is a GPU."""
    if config.cells_from is not None or not isinstance(config.segmenter, AutoConfig):
        return config
    begun_with = None if config.overwrite else _segmenter_of(config.output)
    has_gpu = begun_with == "hoverfast" if begun_with else config.workers.gpus != 0 and has_gpus()
    chosen = config.segmenter.chosen(has_gpu=has_gpu)
    if log and not begun_with:
        logger.info(f"segmenter={chosen.name}: {_WHY[has_gpu]}")
    return config.model_copy(update={"segmenter": chosen})


_WHY = {
    True: "there is a GPU; its weights are for research only, segmenter=hematoxylin needs none",
    False: "no GPU; segmenter=hoverfast finds nuclei better, in nine times the time",
}


def _segmenter_of(output: str) -> str | None:
    """The name of the segmenter that an output was begun with, if it is one of those that ``auto`` stands for."""
    try:
        name = str(Store(output).read_json(SETTINGS)["segmenter"]["name"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of curation's, which opening it tells
        return None
    return name if name in ("hematoxylin", "hoverfast") else None


def check(config: CurateConfig) -> list[Slide]:
    """The slides of a config. Raises ConfigError for all that can be wrong before work begins."""
    slides = list_slides(config.slides)
    tables = [_absolute(f"{config.output.rstrip('/')}/{folder}") for folder in FOLDERS]
    for slide in slides:
        path = _absolute(slide.path)
        if any(path.startswith(f"{table}/") for table in tables):
            raise ConfigError(
                f"slides: {slide.path} lies in the folder of a table of output={config.output}; expected another output"
            )
    if config.cells_from is None:
        config.segmenter.check()
    else:
        config.cells_from.check([slide.slide_id for slide in slides])
    if config.tissue.masks is not None and not path_exists(config.tissue.masks):
        raise ConfigError(f"tissue.masks: got {config.tissue.masks!r}; expected a folder of <slide_id>.png")
    return slides


def _located(config: CurateConfig) -> CellsFrom | None:
    if config.cells_from is None:
        return None
    given = config.cells_from.model_dump(include={"path", "alignment"}, exclude_none=True)
    return config.cells_from.model_copy(update={name: _absolute(path) for name, path in given.items()})


def _absolute(path: str) -> str:
    """A path with its links followed; a URI as it is."""
    return path if is_uri(path) else str(Path(path).expanduser().resolve())


def open_ledger(store: Store, config: CurateConfig) -> Ledger[SlideRow]:
    """The ledger of an output; raises ConfigError when the output was made with other settings."""
    settings = config.result_settings()
    ledger = cells_ledger(store, config_fingerprint=fingerprint(settings))
    ledger.prepare_output(SETTINGS, settings, folders=FOLDERS, overwrite=config.overwrite)
    return ledger


def _pending(
    slides: list[Slide], rows: list[SlideRow], *, ledger: Ledger[SlideRow], config: CurateConfig
) -> list[Slide]:
    """The slides that are to be worked on: new ones, those to be retried, and those whose pixels or mask changed.

    Of these the row goes first, so that after a kill they are new.
    """
    paths = {slide.slide_id: slide.path for slide in slides}
    mpp = {slide.slide_id: slide.mpp for slide in slides}
    finished = [row for row in rows if row.status not in config.retry and row.slide_id in paths]
    drawn = [row.slide_id for row in finished if config.geojson and row.n_nuclei]
    again = {
        "changed since they were curated": changed_sources(finished, paths),
        "have another um/px in the cohort": {
            row.slide_id for row in finished if mpp[row.slide_id] not in (None, row.mpp)
        },
        "have other nuclei in cells_from": set() if config.cells_from is None else config.cells_from.changed(finished),
        "have other tissue masks": changed_masks(finished, config.tissue.masks, stem=file_stem),
        "lost their cells": ledger.without_file((row.slide_id for row in finished if row.n_cells), shard_name),
        "have no GeoJSON": ledger.without_file(drawn, geojson_name),
    }
    for why, slide_ids in again.items():
        if slide_ids:
            some = ", ".join(sorted(slide_ids)[:5]) + (", ..." if len(slide_ids) > 5 else "")
            logger.info(f"{len(slide_ids)} slides {why}, and are curated again: {some}")
    redone = set().union(*again.values())
    for slide_id in redone:
        ledger.forget(slide_id)
        if ledger.store.records.agree(geojson_name(slide_id)):  # nuclei of pixels that are no more
            ledger.store.delete(geojson_name(slide_id))
    done = {row.slide_id for row in finished} - redone
    return [slide for slide in slides if slide.slide_id not in done]


def _demand(config: CurateConfig, *, n_slides: int, key: str = "workers") -> Demand:
    workers = config.workers
    return Demand(
        cpus=workers.cpus,
        gpus=workers.gpus if config.uses_gpu else workers.gpus or 0,
        shares_gpus=True,
        wanted_workers=min(workers.actors or 1, n_slides),
        may_shrink="cpus" not in workers.model_fields_set,
        key=key,
        count_key=f"{key}.actors",
    )


def _curate_all(slides: list[Slide], *, config: CurateConfig, ledger: Ledger[SlideRow], source: SlideAccess) -> None:
    allocation = allocate(_demand(config, n_slides=len(slides)), stage="curate")
    workers = config.workers.model_copy(update={"cpus": allocation.cpus})
    # Paths are made absolute here: actors run elsewhere.
    located = config.model_copy(update={"output": ledger.store.uri, "workers": workers, "cells_from": _located(config)})
    # Where there is a GPU to keep busy, or something to fetch, an actor gets its next slide ready while it curates one.
    on_gpu = allocation.gpus > 0 and config.uses_gpu
    make = functools.partial(Curator, located, ledger=ledger, source=source, surveys_ahead=on_gpu)
    fetches = source is IN_PLACE and any(is_uri(slide.path) for slide in slides)
    ahead = max(source.ahead, int(on_gpu or fetches))
    actors = pool.ActorPool(allocation, max_actors=workers.actors, ahead=ahead)
    items = [LocatedSlide(slide, slide.path) for slide in largest_first(slides)]
    pool.run_all(items, make, actors=actors, max_attempts=config.max_attempts, name="curate")


def largest_first(slides: list[Slide]) -> list[Slide]:
    """Slides by the size of their files, so that no large one is begun when all others are done.

    Those whose size is not known here, as they are yet to be downloaded, come last, in their order.
    """

    def size(slide: Slide) -> int:
        with contextlib.suppress(OSError):  # becomes its row when its turn comes
            return (size_and_time(slide.path) or (0,))[0]
        return 0

    with ThreadPoolExecutor(READERS) as threads:
        sizes = dict(zip((slide.slide_id for slide in slides), threads.map(size, slides), strict=True))
    return sorted(slides, key=lambda slide: -sizes[slide.slide_id])
