"""Cells -> embeddings -> formats, a slide a row: in this process for a few slides, else in pools of Ray actors."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from lemon import curate
from lemon.cells.ledger import read_ledger, tell_statuses
from lemon.cells.select import select_cells
from lemon.config import EXIT_FAILURES, EXIT_OK, ConfigError
from lemon.embed.clusters import open_clusters
from lemon.embed.config import EmbedConfig
from lemon.embed.encode import Embedder, open_encoder
from lemon.embed.export import Exporter
from lemon.embed.ledger import EmbedLedger, Made, open_ledger
from lemon.embed.names import CENTRES, FOLDERS, SETTINGS
from lemon.embed.spatialdata import check_spatialdata
from lemon.encoders.open import Encoder
from lemon.runtime.cluster import quiet_ray_data, start_ray
from lemon.runtime.lease import hold
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store, open_output

OWNS = (*FOLDERS, CENTRES, SETTINGS)
"""What embedding writes in its output."""

FATAL = "fatal"  # status of a row that stops the job; never written to the ledger

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """The job cannot go on: the output cannot be written, or an actor cannot open the model."""


class Worker(Protocol):
    """Works on one slide at a time and commits what became of it."""

    ledger: EmbedLedger

    def work(self, job: dict[str, Any]) -> dict[str, Any]:
        """The slide's row of the ledger."""

    def fail(self, job: dict[str, Any], reason: str) -> dict[str, Any]:
        """The row of a slide that is given up."""


@dataclass(frozen=True)
class Summary:
    """Outcome of a job: the ledger's rows of the table's slides, and how long the new ones took."""

    rows: list[dict[str, Any]]
    n_skipped: int
    n_embedded: int
    embed_s: float
    made: Made
    output: str
    exit_code: int


def run(config: EmbedConfig) -> Summary:
    """Embed the cells of a config and write the formats; returns what became of each slide.

    Raises ConfigError for what the user must mend first; StoppedError when the job cannot go on.
    """
    config, output = _located(config)
    encoder = open_encoder(config.model)
    made = Made(encoder.name, encoder.fingerprint, encoder.width, config.dtype, config.precision)
    code, cells = EXIT_OK, Store(config.cells or config.curate_config().output)
    jobs = _jobs(cells) if config.cells is not None else []  # before anything is overwritten
    ledger = open_ledger(output, made, overwrite=config.overwrite)
    if config.slides is not None:
        code = _curate(config)
        with contextlib.suppress(ConfigError):  # no cells: the line that curation printed says why
            jobs = _jobs(cells)
    pending = ledger.without_embeddings(jobs)
    start = time.perf_counter()
    _embed(pending, config=config, ledger=ledger, cells=cells, encoder=encoder)
    seconds = time.perf_counter() - start
    rows = _export(jobs, config=config, ledger=ledger, cells=cells)
    if sum(row["status"] != "done" for row in rows) > config.max_failed_share * len(rows):
        code = EXIT_FAILURES
    fresh = {job["slide_id"] for job in pending}
    n_embedded = sum(row["n_cells"] for row in rows if row["slide_id"] in fresh)
    return Summary(rows, len(jobs) - len(pending), n_embedded, seconds, made, output.uri, code)


def main(config: EmbedConfig) -> int:
    """``run`` with its outcome told; returns the exit code."""
    try:
        with hold(config.output, stage="embed", owns=OWNS):
            summary = run(config)
    except (StoppedError, OSError) as error:
        print(f"embed: stopped: {error}; what is committed stays, rerun goes on", file=sys.stderr)
        return EXIT_FAILURES
    told = tell_statuses(summary.rows)
    n_cells = sum(row["n_cells"] for row in summary.rows)
    rate = f"{summary.n_embedded / summary.embed_s:,.0f} cells/s" if summary.n_embedded else "none of them now"
    folders = ", ".join(["embeddings/", *(f"{kind}/" for kind in config.format if kind != "parquet")])
    print(
        f"embed: {len(summary.rows)} slides ({told}; {summary.n_skipped} of an earlier run), "
        f"{n_cells:,} cells ({rate}), {summary.made.width} values each by {summary.made.model}; "
        f"{folders} in {summary.output}"
    )
    return summary.exit_code


def _located(config: EmbedConfig) -> tuple[EmbedConfig, Store]:
    """Paths made absolute, because actors run elsewhere; and the output, which can be written."""
    output = open_output(config.output, owns=OWNS)
    if "spatialdata" in config.format:
        check_spatialdata(output)
    update: dict[str, Any] = {"output": output.uri, "model": located_model(config.model)}
    if config.cells is not None:
        update["cells"] = Store(config.cells).uri
        if update["cells"] == output.uri:
            raise ConfigError("output: got the folder of cells; expected another one, both have a table named slides")
    return config.model_copy(update=update), output


def _curate(config: EmbedConfig) -> int:
    """Curate the slides; cells of an earlier run are kept, also when embeddings are to be overwritten."""
    try:
        return curate.main(config.curate_config())
    except ConfigError as error:
        raise ConfigError(str(error).replace("overwrite=true", "curation.overwrite=true")) from None


def located_model(model: str) -> str:
    """A model's path made absolute, also that in ``name:path``; a name stays, even where a folder is called so."""
    name, colon, rest = model.rpartition(":")
    path = Path(rest).expanduser()
    is_encoder = path.is_file() or any((folder / "config.json").is_file() for folder in (path, path / "encoder"))
    return f"{name}{colon}{path.absolute()}" if is_encoder else model


def _jobs(cells: Store) -> list[dict[str, Any]]:
    """The slides of a cells table that have cells. Raises ConfigError when there are none."""
    rows = [row for row in read_ledger(cells).to_pylist() if row["status"] != "failed" and row["n_cells"]]
    if not rows:
        raise ConfigError(f"cells: {cells.uri} holds no cells; expected the output of jobs/curate.py")
    return [
        {
            "slide_id": row["slide_id"],
            "path": row["path"],
            "n_cells": row["n_cells"],
            "cells_digest": row["cells_digest"],
        }
        for row in rows
    ]


def _embed(
    jobs: Sequence[dict[str, Any]], *, config: EmbedConfig, ledger: EmbedLedger, cells: Store, encoder: Encoder
) -> None:
    if not jobs:
        return
    make = functools.partial(Embedder, config, ledger=ledger, cells=cells)
    total = sum(job["n_cells"] for job in jobs)
    with tqdm(total=total, unit="cell", unit_scale=True, desc="embed", disable=None) as bar:
        if config.workers.in_process(len(jobs), cluster="RAY_ADDRESS" in os.environ):
            worker = make(encoder=encoder, progress=bar.update)
            for job in jobs:
                _attempt(worker, job)
        else:
            for row in _on_ray(make, jobs, config=config, gpus=config.workers.gpus):
                bar.update(row["n_cells"])


def _export(
    jobs: Sequence[dict[str, Any]], *, config: EmbedConfig, ledger: EmbedLedger, cells: Store
) -> list[dict[str, Any]]:
    """Clusters and formats of all slides that have embeddings; returns the ledger's rows of the jobs."""
    paths = {job["slide_id"]: job["path"] for job in jobs}
    rows = [row for slide_id, row in ledger.rows().items() if slide_id in paths]
    embedded = [row for row in rows if row["status"] != "failed"]
    if not embedded:
        return rows
    selection = select_cells(cells, slides=[row["slide_id"] for row in embedded], n_cells=config.clusters.n_cells)
    parents = [ledger.made.model_fingerprint, *(row["cells_digest"] for row in embedded)]
    try:
        clusters = open_clusters(
            selection, ledger.store, k=config.clusters.k, seed=config.clusters.seed, parents=parents
        )
    except ShardError as error:
        raise StoppedError(f"{error}; delete that file to have it made again") from None
    make = functools.partial(Exporter, ledger=ledger, cells=cells, clusters=clusters, formats=config.format)
    here = make()
    lacking = here.lacking([row["slide_id"] for row in embedded])
    pending = [
        row | {"path": paths[row["slide_id"]]}
        for row in embedded
        if row["status"] == "partial" or row["slide_id"] in lacking
    ]
    with tqdm(total=len(pending), unit="slide", desc="formats", disable=None if pending else True) as bar:
        if config.workers.in_process(len(pending), cluster="RAY_ADDRESS" in os.environ):
            for row in pending:
                _attempt(here, row)
                bar.update()
        else:
            for _ in _on_ray(make, pending, config=config, gpus=0):
                bar.update()
    return [row for slide_id, row in ledger.rows().items() if slide_id in paths]


def _attempt(worker: Worker, job: dict[str, Any]) -> dict[str, Any]:
    """Work on a slide; whatever a strange one provokes becomes its row, and the job goes on. Raises StoppedError."""
    try:
        return worker.work(job)
    except (OSError, pa.ArrowException) as error:
        raise StoppedError(f"cannot write to {worker.ledger.store.uri}: {error}") from error
    except Exception as error:
        logger.exception("slide %s", job["slide_id"])
        return worker.fail(job, f"unexpected {type(error).__name__}: {error}")


class SlideActor:
    """A worker in a process of Ray's."""

    def __init__(self, make: Callable[[], Worker], run_id: str, max_attempts: int) -> None:
        self.run_id, self.max_attempts = run_id, max_attempts
        self.worker: Worker | None = None
        try:
            self.worker = make()
        except ConfigError as error:
            self.fault = str(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One slide in, its row out, both as JSON. Nothing is raised, because Ray would drop or repeat the row."""
        job = json.loads(batch["job"][0])
        try:
            row = self._attempt(job)
        except (StoppedError, OSError) as error:
            row = {"slide_id": job["slide_id"], "status": FATAL, "n_cells": 0, "error": str(error)}
        return {"row": np.array([json.dumps(row)])}

    def _attempt(self, job: dict[str, Any]) -> dict[str, Any]:
        if self.worker is None:
            raise StoppedError(self.fault)
        crashes = self.worker.ledger.begin(job["slide_id"], run_id=self.run_id)
        if crashes >= self.max_attempts:
            return self.worker.fail(job, f"given up after {crashes} crashes of its worker")
        return _attempt(self.worker, job)


def _on_ray(
    make: Callable[[], Worker], jobs: Sequence[dict[str, Any]], *, config: EmbedConfig, gpus: float | None
) -> Generator[dict[str, Any]]:
    """Rows of the slides as they are finished; raises StoppedError."""
    import ray

    start_ray()
    quiet_ray_data()
    there = ray.cluster_resources()
    if gpus is None:
        gpus = 1.0 if there.get("GPU") and config.device != "cpu" else 0.0
    room = there.get("GPU", 0) / gpus if gpus else there.get("CPU", 1) / config.workers.cpus
    limit = config.workers.actors or max(1, int(room))
    rows = ray.data.from_items([{"job": json.dumps(job)} for job in jobs], override_num_blocks=len(jobs)).map_batches(
        SlideActor,
        fn_constructor_kwargs={"make": make, "run_id": uuid.uuid4().hex[:12], "max_attempts": config.max_attempts},
        batch_size=1,
        num_cpus=config.workers.cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(limit, len(jobs))),
    )
    for item in rows.iter_rows():
        row = json.loads(item["row"])
        if row["status"] == FATAL:
            raise StoppedError(row["error"])
        yield row
