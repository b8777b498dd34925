"""The feed: cells from a table to batches, from the cache and streamed.

python -m benchmarks.feed [--cells 200000] [--slides 40] [--work FOLDER] [--parts rates fill nested memory mixture ...]

Parts, each of which prints its figures and appends them to benchmarks/results/feed.jsonl:

- rates: images/s of a feed with nothing to do: the fill of a cold cache, a warm cache, a stream from Parquet that is in
  the page cache or (cold) is not, and the memory map of one file that earlier versions used;
- fill: eight processes on one cold cache, and the bytes that they wrote in all;
- nested: the disk of the sizes of a study, one after another;
- memory: peak memory of a rank for tables of 1 M to 500 M cells. Simulated: their slides are one shard, named often;
- sizes: 20 steps of pretraining on a tenth, a quarter and all of the cells, with a cache of at most --cache-gb;
- mixture: how far the slides of a batch, and of 100 batches, are from those of the table (total variation distance);
- killed: fills killed at random, and what is left in the cache after the next one, which needs other files;
- checksums: images/s of a checksum, against zlib's CRC-32.

The cells are random bytes. Files are put out of the page cache by posix_fadvise, as far as nobody else uses them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.record import record
from lemon import schema
from lemon.cells.batches import Feed, open_images
from lemon.cells.cache import CachedImages, bytes_in_cache, checksums
from lemon.cells.images import ImagesInMemory, read_images
from lemon.cells.ledger import cells_ledger
from lemon.cells.names import shard_name
from lemon.cells.order import Order, Permutation, Stream, slide_distance
from lemon.cells.select import Part, Selection, rank_of, select_cells
from lemon.cells.shard import PARQUET_OPTIONS, ROW_GROUP_ROWS, images_to_arrow
from lemon.pretrain import job as pretraining
from lemon.pretrain.config import PretrainConfig
from lemon.runtime.config import load
from lemon.runtime.shards import write_shard
from lemon.runtime.store import Store

BATCH = 4096
SMALL = (
    "encoder.name=small encoder.dim=64 encoder.depth=2 encoder.heads=1 batch=256 images_per_epoch=2560 epochs=2 "
    "device=cpu register_as=null tasks=null ssl.hidden_dim=128 ssl.warmup_epochs=1"
)
CPU = torch.device("cpu")


def main() -> None:
    """Make the table once, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--images", type=int, default=400_000, help="that a rate is taken over")
    parser.add_argument("--cache-gb", type=float, default=3, help="of the part sizes")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder that keeps the table; default: a temporary one")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        name, *words = options.worker
        print(json.dumps(WORKERS[name](*words)), flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.work = options.work or Path(scratch)
        store = Store(options.work / f"cells-{options.cells}-{options.slides}")
        write_cells(store, options.cells, slides=options.slides)
        for part in options.parts:
            for figures in PARTS[part](store, options):
                print(
                    part,
                    {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()},
                )
                sizes = {"cells": options.cells, "slides": options.slides}
                record("feed", {"part": part, **sizes, **figures}, packages=("numpy", "pyarrow", "torch"))


def write_cells(store: Store, count: int, *, slides: int) -> None:
    """A cells table of random images, as curation writes it; slides that are there stay."""
    done, each = set(store.list("slides")), count // slides
    ledger = cells_ledger(store, config_fingerprint="benchmark")
    for index in range(slides):
        slide_id = f"s{index:05d}"
        if f"slides/{slide_id}.parquet" in done:
            continue
        ids = np.array([f"{slide_id}_{cell}_0" for cell in range(each)], object)
        ranks = rank_of(ids)
        by_rank = np.argsort(ranks)
        random = np.random.default_rng(index)
        with write_shard(store, shard_name(slide_id), schema.CELLS, **PARQUET_OPTIONS) as shard:
            for start in range(0, each, ROW_GROUP_ROWS):
                rows = by_rank[start : start + ROW_GROUP_ROWS]
                images = random.integers(0, 256, (len(rows), 60, 60, 3), dtype=np.uint8)
                values: dict[str, Any] = {"cell_id": ids[rows], "rank": ranks[rows], "image": images_to_arrow(images)}
                values |= {"slide_id": [slide_id] * len(rows), "polygon": [b""] * len(rows)}
                values |= {name: pa.nulls(len(rows)) for name in ("patient_id", "organ", "site")}
                made = {name: pa.array(values.get(name, np.zeros(len(rows)))) for name in schema.CELLS.names}
                shard.write(pa.table(made).cast(schema.CELLS), row_group_size=ROW_GROUP_ROWS)
        row = schema.SlideRow(slide_id, "", n_cells=each, n_nuclei=each, status="done", cells_digest=shard.digest)
        ledger.commit(row)


def rate(feed: Feed, images: int) -> dict[str, float]:
    """Images a second by the clock and of CPU time, of a feed with nothing to do."""
    steps = max(2, images // feed.batch)
    start, cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch) for batch in feed.batches(0, steps))
    seconds = time.perf_counter() - start
    return {"images_per_s": count / seconds, "cpu_us_per_image": 1e6 * (time.process_time() - cpu) / count}


def out_of_the_page_cache(folder: Path) -> None:
    """Ask the system to forget the content of files."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def feed_of(selection: Selection, cache: Path, *, cache_gb: float) -> Feed:
    """A feed as pretraining opens it."""
    images, order = open_images(selection, cache=cache, cache_gb=cache_gb, seed=0, batch=BATCH)
    return Feed(images, order, batch=BATCH, device=CPU)


def rates(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rates of each way."""
    selection, table = select_cells(store), Path(store.root)
    for cold in (True, False):
        if cold:
            out_of_the_page_cache(table)
        with closing(feed_of(selection, Path("/nonexistent"), cache_gb=0)) as feed:
            images = min(options.images, selection.n_cells) if cold else options.images
            yield {"way": "stream", "cold": cold, **rate(feed, images)}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        out_of_the_page_cache(table)
        start, cpu = time.perf_counter(), time.process_time()
        with closing(feed_of(selection, Path(folder), cache_gb=1000)) as feed:
            seconds = time.perf_counter() - start
            cpu_s = time.process_time() - cpu
            figures = {"images_per_s": selection.n_cells / seconds, "cpu_us_per_image": 1e6 * cpu_s / selection.n_cells}
            yield {"way": "fill", "cold": True, **figures}
            out_of_the_page_cache(Path(folder))
            yield {"way": "cache", "cold": True, **rate(feed, min(options.images, selection.n_cells))}
            rate(feed, selection.n_cells)
            yield {"way": "cache", "cold": False, **rate(feed, options.images)}
        path = Path(folder) / "map"
        with path.open("wb") as stream:
            for part in selection.parts:
                stream.write(read_images(Selection(store, (part,))).data)
        mapped = np.memmap(path, np.uint8, "r", shape=(selection.n_cells, 60, 60, 3))
        feed = Feed(ImagesInMemory(mapped), Permutation(len(mapped), seed=0), batch=BATCH, device=CPU)
        rate(feed, selection.n_cells)
        yield {"way": "memory map", "cold": False, **rate(feed, options.images)}


def fill(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Eight processes at once."""
    selection = select_cells(store)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        start = time.perf_counter()
        workers = [worker("fill", store.uri, folder) for _ in range(8)]
        found = [json.loads(process.communicate("\n")[0].splitlines()[-1]) for process in workers]
        seconds = time.perf_counter() - start
        written = sum(each["written"] for each in found)
        yield {
            "processes": 8,
            "seconds": seconds,
            "written_gb": written / 1e9,
            "once_gb": bytes_in_cache(selection) / 1e9,
        }


def filling(cells: str, cache: str) -> dict[str, Any]:
    """One of them: the bytes of images that it wrote."""
    from lemon.cells import cache as module

    written, write = 0, module._write

    def counted(file: int, content: memoryview, offset: int) -> None:
        nonlocal written
        written += len(content) if len(content) % module.RECORD_BYTES == 0 else 0
        write(file, content, offset)

    module._write = counted
    CachedImages(select_cells(Store(cells)), cache=cache, cache_gb=1000).close()
    return {"written": written}


def nested(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Nested selections, as of a size study, one after another."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for share in (100, 50, 20, 10, 5, 2, 1):
            selection = select_cells(store, n_cells=options.cells // share)
            CachedImages(selection, cache=folder, cache_gb=1000).close()
            used = sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*"))
            yield {"chosen": selection.n_cells, "disk_gb": used / 1e9, "images_gb": bytes_in_cache(selection) / 1e9}


def memory(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A rank's memory, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for way in ("stream", "cache"):
            for n_cells in (1_000_000, 10_000_000, 100_000_000, 500_000_000):
                process = worker("memory", store.uri, folder, way, str(n_cells))
                out, _ = process.communicate()
                yield {"way": way, "of": n_cells, **json.loads(out.splitlines()[-1])}


def one_rank(cells: str, cache: str, way: str, n_cells: str) -> dict[str, Any]:
    """Peak memory of 60 steps, and what selection and imports take before them."""
    part = select_cells(Store(cells)).parts[0]
    names = (f"s{index}" for index in range(-(-int(n_cells) // part.n_rows)))
    selection = Selection(Store(cells), tuple(Part(name, part.name, part.n_rows, part.digest) for name in names))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    with closing(feed_of(selection, Path(cache), cache_gb=1e6 if way == "cache" else 0)) as feed:
        batches = feed.batches(10, 70)
        next(batches)
        seconds = time.perf_counter() - start
        sum(len(batch) for batch in batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"slides_named": len(selection.parts), "before_mb": before, "peak_mb": peak, "first_batch_s": seconds}


def sizes(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pretraining on nested selections with little disk for the cache, each in a process of its own."""
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for share in (10, 4, 1):
            process = worker("train", store.uri, folder, str(options.cells // share), str(options.cache_gb))
            out, _ = process.communicate()
            used = sum(path.stat().st_blocks * 512 for path in (Path(folder) / "cache").rglob("*"))
            yield {"chosen": options.cells // share, "cache_disk_gb": used / 1e9, **json.loads(out.splitlines()[-1])}


def training(cells: str, folder: str, n_cells: str, cache_gb: str) -> dict[str, Any]:
    """Twenty steps of a tiny encoder: how the cells came, and peak memory."""
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    output = f"{folder}/run-{n_cells}"
    words = [f"cells={cells}", f"output={output}", f"cache={folder}/cache", f"cache_gb={cache_gb}"]
    config = load("pretrain", [*words, f"select.n_cells={n_cells}", *SMALL.split()], PretrainConfig)
    start = time.perf_counter()
    if pretraining.main(config):
        raise SystemExit("pretraining failed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    order = Store(output).read_json(pretraining.SETTINGS)["order"]
    return {"order": order, "peak_mb": peak, "seconds": time.perf_counter() - start}


def mixture(_store: Store, _options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Distances of slides, for tables of several shapes."""
    random = np.random.default_rng(0)
    for n_slides, each in ((100, 10_000), (1000, 10_000), (10_000, 30_000)):
        sizes = tuple(random.gamma(2, each / 2, n_slides).astype(int) + 1)
        orders: dict[str, Order] = {
            "uniform": Permutation(sum(sizes), seed=0),
            "stream": Stream(sizes, seed=0, batch=BATCH),
        }
        for name, order in orders.items():
            figures: dict[str, Any] = {"table_slides": n_slides, "table_cells": int(sum(sizes)), "order": name}
            for batches in (1, 10, 100):
                starts = random.integers(0, order.n_cells, 20)
                windows = [order.indices(int(start), BATCH * batches) for start in starts]
                figures[f"distance_{batches}"] = float(np.mean([slide_distance(cells, sizes) for cells in windows]))
                if batches == 1:
                    ends = np.cumsum(sizes)
                    figures["slides_in_a_batch"] = float(
                        np.mean([len(np.unique(np.searchsorted(ends, cells, "right"))) for cells in windows])
                    )
            yield figures


def killed(store: Store, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Kill fills, then let the cache hold one slide alone."""
    slide = select_cells(store, slides=[select_cells(store).parts[0].slide_id])
    random, left, wrong = np.random.default_rng(0), 0, 0
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for _ in range(options.kills):
            process = worker("fill", store.uri, folder)
            while not any(Path(folder).rglob("*.images")):
                time.sleep(0.01)
            time.sleep(random.uniform(0, 1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            with closing(CachedImages(slide, cache=folder, cache_gb=bytes_in_cache(slide) / 1e9)) as images:
                out = np.empty((slide.n_cells, 60, 60, 3), np.uint8)
                images.read(np.arange(slide.n_cells), out)
                wrong += int((out != read_images(slide)).any())
            left += len([path for path in Path(folder).rglob("*") if path.is_file()]) - 2
            for path in Path(folder).rglob("*.images"):
                path.unlink()
    yield {"kills": options.kills, "files_left": left, "wrong_reads": wrong}


def sums(_store: Store, _options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cache's checksum and zlib's."""
    images = np.random.default_rng(0).integers(0, 256, (4096, 10_800), dtype=np.uint8)
    rows = np.arange(len(images))
    for name, of in {
        "ours": lambda: checksums(images, rows),
        "crc32": lambda: [zlib.crc32(each) for each in images],
    }.items():
        start = time.perf_counter()
        for _ in range(5):
            of()
        yield {"checksum": name, "images_per_s": 5 * len(images) / (time.perf_counter() - start)}


def worker(*words: str) -> subprocess.Popen[str]:
    """A process of this benchmark."""
    command = [sys.executable, "-m", "benchmarks.feed", "--worker", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


PARTS: dict[str, Callable[[Store, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "rates": rates,
    "fill": fill,
    "nested": nested,
    "memory": memory,
    "sizes": sizes,
    "mixture": mixture,
    "killed": killed,
    "checksums": sums,
}
WORKERS: dict[str, Callable[..., dict[str, Any]]] = {"fill": filling, "memory": one_rank, "train": training}

if __name__ == "__main__":
    main()
