"""One slide from file to committed cells: reading, network, instances, crops and writing overlap. No Ray in here."""

from __future__ import annotations

import contextlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lemon.cells.crop import Claims, Frame, claim_cells
from lemon.cells.names import geojson_name, shard_name
from lemon.cells.qupath import GeoJsonWriter
from lemon.cells.shard import SlideShard
from lemon.curate.config import CurateConfig
from lemon.curate.processes import ordered_map, run_ahead
from lemon.curate.survey import Survey, open_slide, read_region, survey
from lemon.nuclei.given.segmenter import GivenSegmenter, read_placed
from lemon.nuclei.segmenter import Postprocess, Segmenter
from lemon.runtime.identifiers import file_stem
from lemon.runtime.store import Store
from lemon.schema import CELL_MPP, SlideRow
from lemon.slides.cohort import Slide
from lemon.slides.local import local_slide
from lemon.slides.reader import RegionError, SlideError, SlideReader
from lemon.slides.source import Source, mask_digest, read_source
from lemon.slides.tiles import Region


class OutputError(Exception):
    """The output cannot be written (disk full, no permission): no other slide would fare better."""


@dataclass
class Tally:
    """What happened to a slide so far; becomes its row in the ledger."""

    n_regions: int = 0
    n_failed_regions: int = 0
    n_nuclei: int = 0
    n_cells: int = 0
    n_edge_cells: int = 0
    pen_share: float | None = None
    fold_share: float | None = None
    blurred_share: float | None = None
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("open", "read", "network", "instances", "write"), 0.0)
    )
    cells_digest: str | None = None
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add the time of a block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def take(self, seen: Survey) -> None:
        """What a survey tells of the slide."""
        self.n_regions = len(seen.regions)
        self.notes.extend(seen.notes)
        self.pen_share, self.fold_share, self.blurred_share = seen.pen_share, seen.fold_share, seen.blurred_share

    def columns(self) -> dict[str, Any]:
        """What of it is in the ledger."""
        counts = {name: value for name, value in vars(self).items() if name not in ("seconds", "notes")}
        return counts | {f"{stage}_s": round(seconds, 3) for stage, seconds in self.seconds.items()}


@dataclass(frozen=True)
class FetchedSlide:
    """A slide's file on a local disk, and what was learnt of it on the way; or why it is not there.

    Attributes:
        path: the local file.
        source: its size, time and digest, where it could be read.
        begun_s: when fetching began, by ``time.perf_counter``.
        seconds: how long it took.
        error: what was raised; of ``curate_slide`` to raise, so that it becomes the slide's row.
        survey: what it looks like, where that was found out ahead.
    """

    path: str
    source: Source | None
    begun_s: float
    seconds: float
    error: Exception | None = None
    survey: Survey | None = None


@contextlib.contextmanager
def fetch_slide(slide: Slide, *, config: CurateConfig) -> Iterator[FetchedSlide]:
    """The file of a slide, for as long as the block lasts; may run while another slide is curated. Raises nothing.

    No foreign code looks at the file yet: one that kills its process does so when its turn has come and is counted.
    """
    begun_s, path = time.perf_counter(), slide.path
    source: Source | None = None
    error: Exception | None = None
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(local_slide(slide.path, scratch=config.scratch))
            source = read_source(slide.path, local=Path(path))
        except Exception as raised:  # in its turn it is raised again  # noqa: BLE001
            error = raised
        yield FetchedSlide(path, source, begun_s, time.perf_counter() - begun_s, error)


def curate_slide(
    slide: Slide,
    *,
    config: CurateConfig,
    segmenter: Segmenter | None,
    processes: Executor,
    store: Store,
    fetched: FetchedSlide | None = None,
    free_since_s: float = -math.inf,
) -> SlideRow:
    """Segment a slide, or take the nuclei given for it, and commit its cells; returns its row of the slides table.

    Args:
        slide: the slide.
        config: settings.
        segmenter: None where nuclei are given.
        processes: compute instances and crops.
        store: the output.
        fetched: its file, if it is there already.
        free_since_s: when the slide before came to its end: until then this one took nobody's time.

    The row is without provenance columns. A slide that cannot be used gives a failed row with the reason. Raises
    OutputError when nothing can be written, and BrokenProcessPool when a worker process died.
    """
    tally = Tally()
    row = SlideRow(**vars(replace(slide, mpp=None)), status="failed", n_cells=0)
    with contextlib.ExitStack() as stack:
        fetched = fetched or stack.enter_context(fetch_slide(slide, config=config))
        start, tally.seconds["open"] = max(fetched.begun_s, free_since_s), fetched.seconds
        try:
            if fetched.error is not None:
                raise fetched.error
            with tally.clock("open"):
                if source := fetched.source:
                    row = replace(
                        row,
                        source_size_bytes=source.size_bytes,
                        source_mtime_ns=source.mtime_ns,
                        source_digest=source.digest,
                    )
                row = replace(row, mask_digest=mask_digest(config.tissue.masks, file_stem(slide.slide_id)))
                if config.cells_from is not None:
                    row = replace(row, nuclei_digest=config.cells_from.digest(slide.slide_id))
                reader = open_slide(fetched.path, slide=slide, config=config)
            stack.callback(reader.close)
            row = replace(row, mpp=reader.mpp, mpp_assumed=reader.mpp_assumed)
            row = replace(row, width_px=reader.width_px, height_px=reader.height_px)
            seen = fetched.survey
            if seen is not None and seen.mask_digest != row.mask_digest:
                seen = None  # another mask was given since
            _curate_open(
                reader,
                slide=slide,
                config=config,
                segmenter=segmenter,
                processes=processes,
                store=store,
                tally=tally,
                seen=seen,
            )
            row = replace(row, status="partial" if tally.n_failed_regions else "done")
        except SlideError as error:
            tally.notes.append(str(error))
    return _with_rates(row, tally, config=config, total_s=round(time.perf_counter() - start, 3))


def _with_rates(row: SlideRow, tally: Tally, *, config: CurateConfig, total_s: float) -> SlideRow:
    row = replace(row, **tally.columns(), error="; ".join(tally.notes) or None, total_s=total_s)
    area_mm2 = tally.n_regions * ((config.region_px - config.overlap_px) * CELL_MPP / 1000) ** 2
    return replace(
        row,
        area_mm2=round(area_mm2, 4),
        s_per_mm2=round(total_s / area_mm2, 4) if area_mm2 else None,
        device_share=round(tally.seconds["network"] / total_s, 4) if total_s else None,
        peak_mib=round(_peak_mib(), 1),
    )


def _peak_mib() -> float:
    """Highest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _curate_open(
    reader: SlideReader,
    *,
    slide: Slide,
    config: CurateConfig,
    segmenter: Segmenter | None,
    processes: Executor,
    store: Store,
    tally: Tally,
    seen: Survey | None,
) -> None:
    given = None
    if config.cells_from is not None:
        with tally.clock("instances"):
            given = read_placed(slide.slide_id, reader, config.cells_from)
            tally.notes.extend(given.notes)
    with tally.clock("open"):
        tally.notes.extend(reader.notes)
        seen = seen or survey(reader, slide=slide, config=config, given=given)
        tally.take(seen)
        if given is not None:
            segmenter = GivenSegmenter(given, seen.regions)
        assert segmenter is not None
        calibration = segmenter.calibrate(seen.samples) if seen.samples else None
    frame = Frame(slide=slide, mpp=reader.mpp, scale=reader.scale, bounds_px=reader.bounds_base_px)
    if given is not None:
        frame = replace(frame, seam_px=0)
    # A batch stacked, one in the network, one behind it, one in the processes: memory does not depend on the slide.
    batch = getattr(config.segmenter, "batch", 1)
    with contextlib.closing(SlideShard(keep=config.cells_per_slide)) as shard, contextlib.ExitStack() as stack:
        geojson = stack.enter_context(_geojson(store, slide, reader, wanted=config.geojson))
        readers = stack.enter_context(ThreadPoolExecutor(config.workers.readers))
        images = ordered_map(
            readers, lambda region: _timed_read(reader, region), seen.regions, ahead=config.workers.readers + batch
        )
        # The network computes in a thread of its own, so that it waits for no handing over, writing or instances.
        predictions = _predict(zip(seen.regions, images, strict=True), segmenter=segmenter, batch=batch, tally=tally)
        predicted = stack.enter_context(contextlib.closing(run_ahead(predictions, ahead=2 * batch)))
        claims = ordered_map(
            processes,
            _postprocess_and_claim,
            (
                (_postprocess_of(segmenter, region), image, prediction, calibration, region, frame, shard.rank_below)
                for region, image, prediction in predicted
            ),
            ahead=config.workers.cpus + batch,
        )
        for claimed, seconds in claims:
            tally.seconds["instances"] += seconds
            with tally.clock("write"), _as_output_error():
                held = shard.add(claimed)
                if geojson is not None:
                    geojson.write(held)
        _check_regions(tally, config=config)
        with tally.clock("write"), _as_output_error():
            tally.n_cells, tally.n_edge_cells, tally.cells_digest = shard.commit(store, shard_name(slide.slide_id))
            stack.close()  # completes the GeoJSON, so that it is there before the slide's row
        tally.n_nuclei = shard.n_nuclei


def _timed_read(reader: SlideReader, region: Region) -> tuple[np.ndarray | RegionError, float]:
    start = time.perf_counter()
    try:
        image: np.ndarray | RegionError = read_region(reader, region)
    except RegionError as error:
        image = error
    return image, time.perf_counter() - start


def _predict(
    regions: Iterable[tuple[Region, tuple[np.ndarray | RegionError, float]]],
    *,
    segmenter: Segmenter,
    batch: int,
    tally: Tally,
) -> Iterator[tuple[Region, np.ndarray, Any]]:
    """Run the network over readable regions, while the next batch is read and stacked; unreadable ones are counted."""

    def readable() -> Iterator[tuple[Region, np.ndarray]]:
        for region, (image, seconds) in regions:
            tally.seconds["read"] += seconds
            if isinstance(image, RegionError):
                tally.n_failed_regions += 1
                if tally.n_failed_regions == 1:
                    tally.notes.append(f"first unreadable region: {image}")
            else:
                yield region, image

    def stacked() -> Iterator[tuple[list[Region], np.ndarray]]:
        source = readable()
        while group := list(itertools.islice(source, batch)):
            yield [region for region, _ in group], np.stack([image for _, image in group])

    with contextlib.closing(run_ahead(stacked(), ahead=1)) as batches:
        for group, images in batches:
            with tally.clock("network"):
                predictions = segmenter.predict(images)
            yield from zip(group, images, predictions, strict=True)


def _postprocess_of(segmenter: Segmenter, region: Region) -> Postprocess:
    return segmenter.postprocess_of(region) if isinstance(segmenter, GivenSegmenter) else segmenter.postprocess


def _postprocess_and_claim(
    job: tuple[Postprocess, np.ndarray, Any, Any, Region, Frame, float],
) -> tuple[Claims, float]:
    """What a worker process does with a region; returns the claims and the seconds that they took."""
    postprocess, image, prediction, calibration, region, frame, rank_below = job
    start = time.perf_counter()
    nuclei = postprocess(image, prediction, calibration)
    claims = claim_cells(image, nuclei, region=region, frame=frame, rank_below=rank_below)
    return claims, time.perf_counter() - start


def _check_regions(tally: Tally, *, config: CurateConfig) -> None:
    share = tally.n_failed_regions / max(1, tally.n_regions)
    if share > config.max_failed_region_share:
        raise SlideError(f"{tally.n_failed_regions} of {tally.n_regions} regions cannot be read")


@contextlib.contextmanager
def _geojson(store: Store, slide: Slide, reader: SlideReader, *, wanted: bool) -> Iterator[GeoJsonWriter | None]:
    if not wanted:
        yield None
        return
    with (
        store.write(geojson_name(slide.slide_id)) as stream,
        GeoJsonWriter(stream, origin_px=reader.bounds_px[:2]) as writer,
    ):
        yield writer


@contextlib.contextmanager
def _as_output_error() -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise OutputError(str(error)) from error
