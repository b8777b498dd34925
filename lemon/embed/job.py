"""Cells -> embeddings -> formats, a slide a row: in this process for a few slides, else in pools of Ray actors."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lemon.cells.ledger import rows_with_cells
from lemon.cells.select import select_cells
from lemon.curate import job as curate
from lemon.embed.clusters import open_clusters
from lemon.embed.config import EmbedConfig, FieldConfig
from lemon.embed.context import Context
from lemon.embed.encode import Embedder, open_encoder
from lemon.embed.export import Export, Exporter
from lemon.embed.ledger import EmbeddingSpec, EmbedLedger, open_ledger
from lemon.embed.names import CENTRES, FOLDERS, SETTINGS
from lemon.embed.spatialdata import check_spatialdata
from lemon.encoders.open import Encoder
from lemon.errors import ConfigError, FatalError
from lemon.runtime import pool
from lemon.runtime.cluster import ray_address
from lemon.runtime.console import stage_logger
from lemon.runtime.demand import Demand, allocate, is_new_output
from lemon.runtime.lease import hold
from lemon.runtime.ledger import Summary
from lemon.runtime.shards import ShardError
from lemon.runtime.store import Store
from lemon.schema import EmbeddedRow, SlideRow
from lemon.slides.cohort import Slide

OUTPUT_NAMES = (*FOLDERS, CENTRES, SETTINGS)
"""What embedding writes in its output."""

logger = stage_logger(__name__, "embed")


@dataclass(frozen=True, kw_only=True)
class EmbedSummary(Summary[EmbeddedRow]):
    """What became of a table's slides, and how long the new ones took."""

    n_embedded: int
    embed_s: float
    spec: EmbeddingSpec


def run(config: EmbedConfig, *, slides: list[Slide] | None = None) -> EmbedSummary:
    """Embed the cells of a config and write the formats; logs and returns what became of each slide.

    ``slides`` are those that curation was asked about already.

    Raises ConfigError for what the user must correct first; FatalError when the job cannot go on.
    """
    with hold(config.output, stage="embed", names=OUTPUT_NAMES) as output:
        cells = Store(config.cells or config.curate_config().output)
        summary = _run(_with_absolute_paths(config, output, cells), output, cells, slides=slides)
    counts = summary.log_and_describe(logger)
    n_cells = sum(row.n_cells for row in summary.rows)
    rate = f"{summary.n_embedded / summary.embed_s:,.0f} cells/s" if summary.n_embedded else "none of them now"
    folders = ", ".join(["embeddings/", *(f"{kind}/" for kind in config.format if kind != "parquet")])
    logger.info(
        f"{counts}, {n_cells:,} cells ({rate}), {summary.spec.width} values each by {summary.spec.title}; "
        f"{folders} in {output.uri}"
    )
    return summary


def _run(config: EmbedConfig, output: Store, cells: Store, *, slides: list[Slide] | None) -> EmbedSummary:
    encoder, context = open_encoder(config.model), config.context.open()
    spec = EmbeddingSpec(
        encoder.name,
        context.fingerprint(encoder),
        context.width(encoder.width),
        config.dtype,
        config.precision,
        context.facts,
    )
    for note in context.notes():
        logger.info(note)
    jobs = rows_with_cells(cells) if config.cells is not None else []  # before anything is overwritten
    context.check_cells(jobs)
    ledger = open_ledger(output, spec, overwrite=config.overwrite)
    curated = [] if config.slides is None else [_curate(config, slides)]
    if curated:
        with contextlib.suppress(ConfigError):  # no cells: curation has logged why
            jobs = rows_with_cells(cells)
    context.check_cells(jobs)
    pending = ledger.without_embeddings(jobs)
    start = time.perf_counter()
    _embed(pending, config=config, ledger=ledger, cells=cells, encoder=encoder, context=context)
    seconds = time.perf_counter() - start
    rows = _export(jobs, config=config, ledger=ledger, cells=cells)
    new_ids = {job.slide_id for job in pending}
    return EmbedSummary(
        rows=rows,
        n_skipped=len(jobs) - len(pending),
        max_failed_share=config.max_failed_share,
        failures=("partial", "failed"),
        before=curated,
        n_embedded=sum(row.n_cells for row in rows if row.slide_id in new_ids),
        embed_s=seconds,
        spec=spec,
    )


def main(config: EmbedConfig) -> int:
    """``run``, after what it needs of the cluster is asked for; returns the exit code."""
    return run(config, slides=_check_and_allocate(config)).exit_code


def _with_absolute_paths(config: EmbedConfig, output: Store, cells: Store) -> EmbedConfig:
    """Paths made absolute, because actors run elsewhere. Raises ConfigError for an output that does not do."""
    if "spatialdata" in config.format:
        check_spatialdata(output)
    update: dict[str, Any] = {"output": output.uri, "model": absolute_model_path(config.model)}
    if isinstance(config.context, FieldConfig):
        update["context"] = config.context.model_copy(update={"model": absolute_model_path(config.context.model)})
    if config.cells is not None:
        update["cells"] = cells.uri
        if cells.uri == output.uri:
            raise ConfigError("output: got the folder of cells; expected another one, both have a table named slides")
    return config.model_copy(update=update)


def _curate(config: EmbedConfig, slides: list[Slide] | None) -> Summary:
    """Curate the slides; cells of an earlier run are kept, also when embeddings are to be overwritten."""
    try:
        return curate.run(config.curate_config(), slides=slides)
    except ConfigError as error:
        raise ConfigError(str(error).replace("overwrite=true", "curation.overwrite=true")) from None


def absolute_model_path(model: str) -> str:
    """A model's path made absolute, also that in ``name:path``; a name stays, even where a folder is called so."""
    name, colon, rest = model.rpartition(":")
    path = Path(rest).expanduser()
    is_encoder = path.is_file() or any((folder / "config.json").is_file() for folder in (path, path / "encoder"))
    return f"{name}{colon}{path.absolute()}" if is_encoder else model


def _embed(
    jobs: Sequence[SlideRow],
    *,
    config: EmbedConfig,
    ledger: EmbedLedger,
    cells: Store,
    encoder: Encoder,
    context: Context,
) -> None:
    if not jobs:
        return
    actors = _actors(config, n_slides=len(jobs), gpus=config.workers.gpus)
    make = functools.partial(Embedder, config, ledger=ledger, cells=cells)
    if actors is None:  # actors open their own
        make = functools.partial(make, encoder=encoder, context=context)
    pool.run_all(
        jobs,
        make,
        actors=actors,
        max_attempts=config.max_attempts,
        name="embed",
        unit="cell",
        size=lambda each: each.n_cells,
    )


def _export(jobs: Sequence[SlideRow], *, config: EmbedConfig, ledger: EmbedLedger, cells: Store) -> list[EmbeddedRow]:
    """Clusters and formats of all slides that have embeddings; returns the ledger's rows of the jobs."""
    paths = {job.slide_id: job.path for job in jobs}
    rows = [row for slide_id, row in ledger.rows().items() if slide_id in paths]
    embedded = [row for row in rows if row.status != "failed"]
    if not embedded:
        return rows
    selection = select_cells(cells, slides=[row.slide_id for row in embedded], n_cells=config.clusters.n_cells)
    parents = [ledger.spec.model_fingerprint, *(row.cells_digest for row in embedded)]
    try:
        clusters = open_clusters(
            selection, ledger.store, k=config.clusters.k, seed=config.clusters.seed, parents=parents
        )
    except ShardError as error:
        raise FatalError(f"{error}; delete that file to have it made again") from None
    formats = [*(["morphometry"] if config.morphometry else []), *config.format]
    make = functools.partial(Exporter, ledger=ledger, cells=cells, clusters=clusters, formats=formats)
    local = make()
    unfinished = local.without_file([row.slide_id for row in embedded])
    pending = [
        Export(row, paths[row.slide_id]) for row in embedded if row.status == "partial" or row.slide_id in unfinished
    ]
    actors = _actors(config, n_slides=len(pending), gpus=0)
    pool.run_all(pending, make, actors=actors, max_attempts=config.max_attempts, name="formats")
    return [row for slide_id, row in ledger.rows().items() if slide_id in paths]


def _check_and_allocate(config: EmbedConfig) -> list[Slide] | None:
    """Check what the job asks of the cluster before it writes anything; the slides to curate. Raises ConfigError."""
    slides = (
        None if config.slides is None else curate.check_and_allocate(config.curate_config(), key="curation.workers")
    )
    n_slides = len(rows_with_cells(Store(config.cells or "")) if slides is None else slides)
    if is_new_output(config.output, table="slides"):
        _actors(config, n_slides=n_slides, gpus=config.workers.gpus)
    return slides


def _actors(config: EmbedConfig, *, n_slides: int, gpus: float | None) -> pool.ActorPool | None:
    """The pool for so many slides; None where this process works on them. Raises ConfigError."""
    workers = config.workers
    if n_slides == 0 or workers.in_process(n_slides, cluster=ray_address() is not None):
        return None
    demand = Demand(
        cpus=workers.cpus,
        gpus=0 if config.device == "cpu" and gpus is None else gpus,
        wanted_workers=min(workers.actors or 1, n_slides),
        may_shrink="cpus" not in workers.model_fields_set,
        count_key="workers.actors",
    )
    return pool.ActorPool(allocate(demand, stage="embed"), max_actors=workers.actors)
