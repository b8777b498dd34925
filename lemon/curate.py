"""Slides -> nuclei -> cells on Ray Data: a slide a row, in a pool of actors that each commit what they finish."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lemon.cells.ledger import Ledger, open_ledger, tell_statuses
from lemon.cells.names import FOLDERS, SETTINGS, file_stem, ledger_name
from lemon.config import EXIT_FAILURES, EXIT_OK, ConfigError, CurateConfig, HoverFastConfig
from lemon.runtime.cluster import quiet_ray_data, start_ray
from lemon.runtime.lease import hold
from lemon.runtime.store import Store, is_uri, open_output, path_exists
from lemon.slide import OutputError, build_segmenter, curate_slide, start_processes
from lemon.slides.cohort import Slide, list_slides
from lemon.slides.download import DownloadError
from lemon.slides.source import changed_masks, changed_sources

OWNS = (*FOLDERS, SETTINGS)
"""What curation writes in its output."""

FATAL = "output"  # status of a row that stops the job; never written to the ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Outcome of a job: the ledger's rows of the slides that were asked for."""

    rows: list[dict[str, Any]]
    n_skipped: int
    exit_code: int


Locate = Callable[[Slide], contextlib.AbstractContextManager[str]]
"""Makes a slide's file be there for the length of a block, and says where. Raises DownloadError."""


@dataclass(frozen=True)
class Source:
    """Where the actors find the slides.

    Attributes:
        open: makes what locates them, in each actor; has to be picklable.
        ahead: slides that an actor locates while it curates another.
    """

    open: Callable[[], Locate]
    ahead: int


def _in_place() -> Locate:
    return lambda slide: contextlib.nullcontext(slide.path)


IN_PLACE = Source(open=_in_place, ahead=0)


def run(config: CurateConfig, *, source: Source = IN_PLACE) -> Summary:
    """Curate the slides of a config; returns what became of each.

    A slide that its source could not provide gets no row, so that it is tried again by a rerun.

    Raises ConfigError for what the user must mend first; OutputError when the output cannot be written any more.
    """
    slides = check(config)
    ledger = open_ledger(open_output(config.output, owns=OWNS), config)
    pending = _pending(slides, ledger, config)
    if pending:
        _run_on_ray(pending, config=config, ledger=ledger, source=source)
    wanted = {slide.slide_id for slide in slides}
    rows = [row for row in ledger.rows() if row["slide_id"] in wanted]
    failed = sum(row["status"] == "failed" for row in rows)
    code = EXIT_FAILURES if failed > config.max_failed_share * len(rows) else EXIT_OK
    return Summary(rows=rows, n_skipped=len(slides) - len(pending), exit_code=code)


def main(config: CurateConfig, *, source: Source = IN_PLACE) -> int:
    """``run`` with its outcome told; returns the exit code."""
    check(config)
    try:
        with hold(config.output, stage="curate", owns=OWNS):
            summary = run(config, source=source)
    except OutputError as error:
        print(
            f"curate: cannot write to {config.output}: {error}; what is committed stays, rerun goes on", file=sys.stderr
        )
        return EXIT_FAILURES
    told = tell_statuses(summary.rows)
    total = {name: sum(row[name] or 0 for row in summary.rows) for name in ("n_nuclei", "n_cells")}
    print(
        f"curate: {len(summary.rows)} slides ({told}; {summary.n_skipped} of an earlier run), "
        f"{total['n_nuclei']:,} nuclei, {total['n_cells']:,} cells in {config.output}"
    )
    return summary.exit_code


class SlideActor:
    """Works on one slide at a time; holds the segmenter and the worker processes.

    Called from several threads, it curates in one while the others wait for slides to be located.
    """

    def __init__(self, config: CurateConfig, config_fingerprint: str, run_id: str, source: Source = IN_PLACE) -> None:
        self.config, self.run_id = config, run_id
        self.locate, self.turn = source.open(), threading.Lock()
        self.ledger = Ledger(Store(config.output), config_fingerprint=config_fingerprint)
        self.segmenter = build_segmenter(config.segmenter)
        self.processes = start_processes(config.workers.cpus)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One slide in, its status out, both as JSON: in a column of numbers a missing value would become NaN.

        Nothing is raised, because Ray would drop or repeat the row.
        """
        slide = Slide(**json.loads(batch["slide"][0]))
        try:
            with self.locate(slide) as path, self.turn:
                row = self._attempt(slide, path=path)
        except DownloadError as error:
            row = _failed(slide, str(error))
        except (OutputError, OSError) as error:
            row = {"slide_id": slide.slide_id, "status": FATAL, "n_cells": 0, "error": str(error)}
        return {"row": np.array([json.dumps(row)])}

    def _attempt(self, slide: Slide, *, path: str) -> dict[str, Any]:
        """Curate the file at ``path`` and commit; a slide that keeps killing its workers is given up."""
        while (crashes := self.ledger.begin(slide.slide_id, run_id=self.run_id)) < self.config.max_attempts:
            try:
                row = curate_slide(
                    replace(slide, path=path),
                    config=self.config,
                    segmenter=self.segmenter,
                    processes=self.processes,
                    store=self.ledger.store,
                )
                return self.ledger.commit(row | {"path": slide.path})
            except BrokenProcessPool:
                self.processes = start_processes(self.config.workers.cpus)
            except OutputError:
                raise
            except Exception as error:  # whatever a strange slide provokes becomes its row, and the job goes on
                logger.exception("slide %s", slide.slide_id)
                return self.ledger.commit(_failed(slide, f"unexpected {type(error).__name__}: {error}"))
        return self.ledger.commit(_failed(slide, f"given up after {crashes} crashes of its worker"))


def _failed(slide: Slide, reason: str) -> dict[str, Any]:
    return asdict(slide) | {"status": "failed", "n_cells": 0, "error": " ".join(reason.split())}


def check(config: CurateConfig) -> list[Slide]:
    """The slides of a config. Raises ConfigError for all that can be wrong before work begins."""
    slides = list_slides(config.slides)
    for slide in slides:
        for folder in FOLDERS:
            if _lies_in(slide.path, f"{config.output.rstrip('/')}/{folder}"):
                raise ConfigError(
                    f"slides: {slide.path} lies in the folder of a table of output={config.output}; expected another "
                    "output"
                )
    if isinstance(config.segmenter, HoverFastConfig) and not path_exists(config.segmenter.checkpoint):
        raise ConfigError(
            f"segmenter.checkpoint: got {config.segmenter.checkpoint!r}, which is no file; expected a HoverFast "
            "checkpoint, such as hoverfast_crosstissue_best_model.pth from HoverFast's repository"
        )
    if config.tissue.masks is not None and not path_exists(config.tissue.masks):
        raise ConfigError(f"tissue.masks: got {config.tissue.masks!r}; expected a folder of <slide_id>.png")
    return slides


def _lies_in(path: str, folder: str) -> bool:
    if is_uri(path) or is_uri(folder):
        return path.startswith(f"{folder}/")
    return Path(path).resolve().is_relative_to(Path(folder).expanduser().resolve())


def _pending(slides: list[Slide], ledger: Ledger, config: CurateConfig) -> list[Slide]:
    """The slides that are to be worked on: new ones, those to be retried, and those whose pixels or mask changed.

    Of these the row goes first, so that after a kill they are new.
    """
    paths = {slide.slide_id: slide.path for slide in slides}
    mpp = {slide.slide_id: slide.mpp for slide in slides}
    finished = [row for row in ledger.rows() if row["status"] not in config.retry and row["slide_id"] in paths]
    again = {
        "changed since they were curated": changed_sources(finished, paths),
        "have another um/px in the cohort": {
            row["slide_id"] for row in finished if mpp[row["slide_id"]] not in (None, row["mpp"])
        },
        "have other tissue masks": changed_masks(finished, config.tissue.masks, stem=file_stem),
        "lost their cells": ledger.without_shard(finished),
    }
    for why, slide_ids in again.items():
        if slide_ids:
            some = ", ".join(sorted(slide_ids)[:5]) + (", ..." if len(slide_ids) > 5 else "")
            print(f"curate: {len(slide_ids)} slides {why}, and are curated again: {some}")
    redone = set().union(*again.values())
    for slide_id in redone:
        ledger.store.delete(ledger_name(slide_id))
    done = {row["slide_id"] for row in finished} - redone
    return [slide for slide in slides if slide.slide_id not in done]


def _run_on_ray(slides: list[Slide], *, config: CurateConfig, ledger: Ledger, source: Source) -> None:
    import ray

    start_ray()
    quiet_ray_data()
    workers = config.workers
    limit = workers.actors or max(1, int(ray.cluster_resources().get("CPU", 1)) // workers.cpus)
    # Paths are made absolute here: actors run elsewhere.
    located = config.model_copy(update={"output": ledger.store.uri})
    statuses = ray.data.from_items(
        [{"slide": json.dumps(asdict(slide))} for slide in slides], override_num_blocks=len(slides)
    ).map_batches(
        SlideActor,
        fn_constructor_kwargs={
            "config": located,
            "config_fingerprint": ledger.config_fingerprint,
            "run_id": uuid.uuid4().hex[:12],
            "source": source,
        },
        batch_size=1,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus,
        max_concurrency=1 + source.ahead,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=min(limit, len(slides)), enable_true_multi_threading=source.ahead > 0
        ),
    )
    with tqdm(total=len(slides), unit="slide", desc="curate", disable=None) as bar:
        cells = failed = 0
        for item in statuses.iter_rows():
            row = json.loads(item["row"])
            if row["status"] == FATAL:
                raise OutputError(row["error"])
            cells, failed = cells + (row["n_cells"] or 0), failed + (row["status"] == "failed")
            bar.set_postfix(cells=cells, failed=failed, refresh=False)
            bar.update()
