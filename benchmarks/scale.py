"""Metadata at the size of a large study: 10,000 slides of 50,000 cells, without their images.

python -m benchmarks.scale [--slides 10000] [--cells 50000] [--curated 2000] [--ordered 500000000] [--steps ...]

Simulated: no image is written. A shard has its true row groups and footer and true ranks; its other columns are null,
and TEMPLATES shards stand for all (hard links), so reading them is from the page cache. Slide files are empty. Curation
runs through Ray Data with an actor that segments nothing and commits a row. Each figure is of a process of its own;
memory is its peak (of the driver, for curation), less that of a process that only imports the package.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.record import record
from lemon import schema
from lemon.cells.ledger import read_ledger
from lemon.cells.names import shard_name
from lemon.cells.order import Order, Permutation, Stream
from lemon.cells.select import select_cells
from lemon.cells.shard import PARQUET_OPTIONS, ROW_GROUP_ROWS
from lemon.curate import job as curate
from lemon.curate.config import CurateConfig
from lemon.curate.job import open_ledger
from lemon.runtime.config import load
from lemon.runtime.identifiers import file_stem
from lemon.runtime.ledger import Ledger
from lemon.runtime.records import FileRecord
from lemon.runtime.store import Store
from lemon.schema import SlideRow

TEMPLATES = 20
ORGANS = ("breast", "colon", "kidney", "lung", "ovary")


def main() -> None:
    """Lay the study out once, then measure each step in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--cells", type=int, default=50_000, help="of a slide")
    parser.add_argument("--curated", type=int, default=2000, help="slides of the curation that segments nothing")
    parser.add_argument("--ordered", type=int, default=500_000_000, help="cells whose order is made")
    parser.add_argument("--steps", nargs="+", default=[name for name in STEPS if name != "nothing"], choices=STEPS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(measured(lambda: STEPS[options.step](options))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        start = time.perf_counter()
        lay_out(options)
        files = sum(len(names) for _, _, names in os.walk(options.folder / "cells"))
        print(f"{files:,} files laid out in {time.perf_counter() - start:.0f} s")
        cells = options.slides * options.cells
        sizes = {"slides": options.slides, "cells": cells, "curated": options.curated, "ordered": options.ordered}
        idle = in_own_process("nothing", options)["peak_mb"]
        for name in options.steps:
            figures = in_own_process(name, options)
            figures["peak_mb"] -= idle
            told = "{seconds:>8.1f} s, {cpu_s:>6.1f} s of CPU, {peak_mb:>6.0f} MB  {found}"
            print(f"{name:<26} {told.format(**figures)}", flush=True)
            record("scale", {**sizes, "files": files, "step": name, **figures}, packages=("pyarrow", "ray"))


def in_own_process(step: str, options: argparse.Namespace) -> dict[str, Any]:
    """A step's figures."""
    command = [sys.executable, "-m", "benchmarks.scale", "--step", step, "--folder", str(options.folder)]
    command += [f"--{name}={getattr(options, name)}" for name in ("slides", "cells", "curated", "ordered")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measured(step: Callable[[], Any]) -> dict[str, Any]:
    """Seconds by the clock and of this process on the CPU, its peak memory, and what the step found."""
    start, cpu = time.perf_counter(), time.process_time()
    found = step()
    figures = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    return figures | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "found": found}


def lay_out(options: argparse.Namespace) -> None:
    """The output of a curation that is done: ledger, shards, settings, and the (empty) slide files."""
    store, config = Store(options.folder / "cells"), curation(options.folder)
    facts = open_ledger(store, config).facts | {"code_version": "benchmark"}
    generator = np.random.default_rng(0)
    for index in range(TEMPLATES):
        write_shard(store, f"templates/{index}.parquet", np.sort(generator.random(options.cells) / 10))
    for name in ("cells/cells", "cells/slides", "slides"):
        (options.folder / name).mkdir()
    for index in range(options.slides):
        slide_id = name_of(index)
        slide = options.folder / "slides" / f"{slide_id}.svs"
        slide.touch()
        template = f"templates/{index % TEMPLATES}.parquet"
        os.link(store.path(template), store.path(shard_name(slide_id)))
        store.records.note(shard_name(slide_id), store.records.of(template)[0], replaced=None)
        row = replace(row_of(slide_id, str(slide), n_cells=options.cells), **facts)
        # Not by the store, whose writes wait for the disk.
        name = f"slides/{file_stem(slide_id)}.parquet"
        pq.write_table(SlideRow.table([row]), store.path(name))
        store.records.note(name, FileRecord.of(Path(store.path(name))), replaced=None)
    store.delete("templates")


def curation(folder: Path, *, output: str = "cells") -> CurateConfig:
    """Settings of a curation in the benchmark's folder."""
    return load("curate", [f"slides={folder / 'slides'}", f"output={folder / output}"], CurateConfig)


def name_of(index: int) -> str:
    """A slide id as long as TCGA's."""
    return f"XXXX-00-{index:06d}-01Z-00-DX1.00000000-0000-0000-0000-000000000000"


def row_of(slide_id: str, path: str, *, n_cells: int) -> SlideRow:
    """A row of the ledger."""
    organ = ORGANS[int(slide_id[8:14]) % len(ORGANS)]
    return SlideRow(
        slide_id,
        path,
        patient_id=slide_id[:14],
        organ=organ,
        status="done",
        n_nuclei=10 * n_cells,
        n_cells=n_cells,
        cells_digest=slide_id,  # names them as well as a true one
    )


def write_shard(store: Store, name: str, ranks: np.ndarray) -> None:
    """A shard of ranks, with nothing in the other columns."""
    table = pa.schema([field.with_nullable(True) for field in schema.CELLS])
    with store.write(name) as stream, pq.ParquetWriter(stream, table, **PARQUET_OPTIONS) as writer:
        for start in range(0, len(ranks), ROW_GROUP_ROWS):
            own = ranks[start : start + ROW_GROUP_ROWS]
            columns = {field.name: pa.nulls(len(own), field.type) for field in table}
            writer.write_table(pa.table(columns | {"rank": own}, schema=table), row_group_size=ROW_GROUP_ROWS)


class Idle(curate.Curator):
    """A worker that segments nothing and commits a row."""

    def __init__(self, config: CurateConfig, *, ledger: Ledger[SlideRow], source: curate.SlideAccess) -> None:
        self.config, self.locate, self.ledger = config, source.open(), ledger

    def work(self, item: curate.LocatedSlide) -> SlideRow:
        """A row without cells."""
        return self.ledger.commit(row_of(item.slide.slide_id, item.slide.path, n_cells=0))


def curate_nothing(options: argparse.Namespace) -> str:
    """Slides through Ray Data and the ledger."""
    config = curation(options.folder, output="curated")
    few = sorted(str(path) for path in (options.folder / "slides").iterdir())[: options.curated]
    curate.Curator = Idle  # type: ignore[misc]
    start = time.perf_counter()
    summary = curate.run(config.model_copy(update={"slides": few}))
    rate = len(summary.rows) / (time.perf_counter() - start)
    return f"{len(summary.rows):,} rows, {rate:.0f} slides/s, Ray's start included"


def select(options: argparse.Namespace, **wanted: Any) -> str:
    """A selection by rank."""
    selection = select_cells(Store(options.folder / "cells"), **wanted)
    return f"{selection.n_cells:,} cells of {len(selection.parts):,} slides"


def rerun(options: argparse.Namespace) -> str:
    """A curation of which everything is done."""
    summary = curate.run(curation(options.folder))
    return f"{summary.n_skipped:,} skipped"


def order_cells(options: argparse.Namespace, make: Callable[[tuple[int, ...]], Order]) -> str:
    """The first batch, and one that lies in two passes."""
    sizes = (options.cells,) * (options.ordered // options.cells)
    order = make(sizes)
    order.indices(0, 4096)
    return f"{len(order.indices(order.n_cells - 2048, 4096)):,} indices over the end of a pass"


STEPS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "nothing": lambda _: "",
    "read the ledger": lambda options: f"{read_ledger(Store(options.folder / 'cells')).num_rows:,} rows",
    "select all": select,
    "select 1,000 slides": lambda options: select(options, organs=ORGANS[:3], n_slides=1000),
    "select 1M cells": lambda options: select(options, n_cells=1_000_000),
    "select half of the cells": lambda options: select(options, n_cells=options.slides * options.cells // 2),
    "rerun, all done": rerun,
    "order of training": partial(order_cells, make=lambda sizes: Permutation(sum(sizes), seed=0)),
    "order of a stream": partial(order_cells, make=lambda sizes: Stream(sizes, seed=0, batch=4096)),
    "curate nothing": curate_nothing,
}

if __name__ == "__main__":
    main()
