"""Peak memory and rate of the embedding job: 1, 10 and 100 copies of a slide, and one slide of so many times its cells.

python -m benchmarks.embed [--cells 2000] [--times 1 10 100] [--width 32] [--depth 1]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import shapely

from benchmarks.record import record
from lemon import schema
from lemon.cells.ledger import cells_ledger
from lemon.cells.names import shard_name
from lemon.cells.shard import PARQUET_OPTIONS, ROW_GROUP_ROWS, images_to_arrow
from lemon.encoders.config import LEMON_MEAN, LEMON_STD, EncoderConfig
from lemon.encoders.export import CellInput, export_encoder
from lemon.encoders.vit import build_vit
from lemon.runtime.shards import write_shard
from lemon.runtime.store import Store

JOB = Path(__file__).resolve().parents[1] / "jobs" / "embed.py"


def main() -> None:
    """Run the job once for each number of copies, as slides and as cells of one slide, and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=2000, help="cells of a slide")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--width", type=int, default=32, help="values of an embedding; a multiple of 8")
    parser.add_argument("--depth", type=int, default=1, help="blocks of the encoder")
    options = parser.parse_args()
    rows = []
    for times in options.times:
        for slides, cells in dict.fromkeys([(times, options.cells), (1, times * options.cells)]):
            with tempfile.TemporaryDirectory() as scratch:
                config = EncoderConfig(name="vit", dim=options.width, depth=options.depth, heads=options.width // 8)
                source = CellInput(LEMON_MEAN, LEMON_STD)
                export_encoder(build_vit(config), Path(scratch) / "run" / "encoder", cell_input=source)
                write_cells(Store(f"{scratch}/cells"), slides=slides, cells=cells)
                rows.append({"slides": slides, "cells": cells, **embed(Path(scratch))})
            told = "{slides:>4} slides of {cells:>7,} cells: peak {peak_mb:>6.0f} MB, {cells_s:>6.0f} cells/s, "
            print((told + "{seconds:.0f} s in all").format(**rows[-1]))
    record("embed", {"width": options.width, "depth": options.depth, "runs": rows}, packages=("torch", "pyarrow"))


def embed(folder: Path) -> dict[str, float]:
    """Peak resident memory (MB) of one job that writes every format but SpatialData, its cells/s of embedding alone."""
    words = [f"model={folder / 'run'}", f"cells={folder / 'cells'}", f"output={folder / 'out'}", "device=cpu"]
    words += ["format=[parquet,h5ad,geojson]", "workers.launcher=process"]
    start, peak = time.monotonic(), 0.0
    job = subprocess.Popen([sys.executable, str(JOB), *words], stdout=subprocess.PIPE, text=True)
    while job.poll() is None:
        try:
            peak = max(peak, psutil.Process(job.pid).memory_info().rss / 1e6)
        except psutil.Error:
            break
        time.sleep(0.05)
    told, _ = job.communicate()
    rate = re.search(r"\(([\d,]+) cells/s\)", told)
    if job.returncode or rate is None:
        raise SystemExit(f"the job failed with exit code {job.returncode}: {told}")
    return {"peak_mb": peak, "cells_s": float(rate[1].replace(",", "")), "seconds": time.monotonic() - start}


def write_cells(store: Store, *, slides: int, cells: int) -> None:
    """A cells table of noise, a row group at a time."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (min(cells, ROW_GROUP_ROWS), 60, 60, 3), np.uint8)
    for slide in range(slides):
        slide_id = f"s{slide:04d}"
        with write_shard(store, shard_name(slide_id), schema.CELLS, **PARQUET_OPTIONS) as shard:
            for start in range(0, cells, ROW_GROUP_ROWS):
                count = min(ROW_GROUP_ROWS, cells - start)
                ranks = (start + np.arange(count)) / cells
                shard.write(_rows(slide_id, ranks, images=images[:count], generator=generator))
        counts = {"n_cells": cells, "n_nuclei": cells}
        row = schema.SlideRow(slide_id, "", status="done", cells_digest=shard.digest, **counts)
        cells_ledger(store, config_fingerprint="benchmark").commit(row)


def _rows(slide_id: str, ranks: np.ndarray, *, images: np.ndarray, generator: np.random.Generator) -> pa.Table:
    center = generator.uniform(0, 50_000, (len(ranks), 2))
    values = {
        "cell_id": [f"{slide_id}_{x:.3f}_{y:.3f}" for x, y in center],
        "slide_id": [slide_id] * len(ranks),
        "x_level0_px": center[:, 0],
        "y_level0_px": center[:, 1],
        "mpp": np.full(len(ranks), 0.25),
        "polygon": list(shapely.to_wkb(shapely.buffer(shapely.points(center), 12))),
        "rank": ranks,
        "image": images_to_arrow(images),
    }
    nothing = np.zeros(len(ranks))
    arrays = [
        pa.array(values.get(field.name, [None] * len(ranks) if field.nullable else nothing)).cast(field.type)
        for field in schema.CELLS
    ]
    return pa.table(arrays, schema=schema.CELLS)


if __name__ == "__main__":
    main()
