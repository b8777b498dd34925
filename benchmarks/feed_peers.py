"""The feed beside litdata, WebDataset, Lance and Mosaic's streaming, on the same cells: rate, first batch, disk.

python -m benchmarks.feed_peers --work FOLDER [--cells 200000] [--peers ...]

Needs ``pip install litdata webdataset pylance mosaicml-streaming``. Each gets the cells of the table of
``benchmarks.feed`` in its own format, on the same disk, and gives shuffled batches of 4,096 images uint8 [60, 60, 3],
with its own shuffling at its usual settings and with two worker processes (Lance: two threads; LEMON: its own). The
first pass warms the page cache, the second is measured. Rates are by the clock; what the processors of all processes
spent is not in them.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.feed import BATCH, feed_of, write_cells
from benchmarks.record import record
from lemon.cells.images import read_images
from lemon.cells.order import Permutation
from lemon.cells.select import Selection, select_cells
from lemon.runtime.store import Store

WORKERS = 2
SHARD_BYTES = 64 << 20

Open = Callable[[], Iterable[torch.Tensor]]


def main() -> None:
    """Write each format, read it twice, tell the second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    options = parser.parse_args()
    store = Store(options.work / f"cells-{options.cells}-{options.slides}")
    write_cells(store, options.cells, slides=options.slides)
    selection = select_cells(store)
    for name in options.peers:
        with tempfile.TemporaryDirectory(dir=options.work) as scratch:
            start = time.perf_counter()
            opened = PEERS[name](selection, Path(scratch))
            made = time.perf_counter() - start
            figures = {"peer": name, "version": version_of(name), "cells": selection.n_cells, "make_s": made}
            figures |= measured(opened)
            figures["disk_gb"] = sum(path.stat().st_blocks * 512 for path in Path(scratch).rglob("*")) / 1e9
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in figures.items()},
                flush=True,
            )
            record("feed", {"part": "peers", **figures}, packages=("numpy", "pyarrow", "torch"))


def measured(opened: Open) -> dict[str, float]:
    """Seconds to the first batch and images a second, in the second pass."""
    for _ in opened():
        pass
    start = time.perf_counter()
    count, first = 0, 0.0
    for batch in opened():
        assert batch.dtype == torch.uint8
        assert batch.shape[1:] == (60, 60, 3)
        if not count:
            first = time.perf_counter() - start
            began = time.perf_counter()
            count = 1
            continue
        count += len(batch)
    return {"first_batch_s": first, "images_per_s": (count - 1) / (time.perf_counter() - began)}


def images_of(selection: Selection) -> Iterator[np.ndarray]:
    """Images slide by slide, uint8 [n, 60, 60, 3]."""
    for part in selection.parts:
        yield read_images(Selection(selection.store, (part,)))


def by_cache(selection: Selection, folder: Path) -> Open:
    """LEMON from its cache."""
    return by_lemon(selection, folder, cache_gb=1000)


def by_stream(selection: Selection, folder: Path) -> Open:
    """LEMON from its table."""
    return by_lemon(selection, folder, cache_gb=0)


def by_lemon(selection: Selection, folder: Path, *, cache_gb: float) -> Open:
    """One pass of a feed."""

    def batches() -> Iterator[torch.Tensor]:
        with closing(feed_of(selection, folder, cache_gb=cache_gb)) as feed:
            yield from feed.batches(0, selection.n_cells // BATCH)

    return batches


class EachImage:
    """Gives litdata one image for a number, of the slide that was read last."""

    def __init__(self, selection: Selection) -> None:
        self.selection, self.part, self.images = selection, -1, np.empty(0)

    def __call__(self, number: int) -> torch.Tensor:
        part = int(np.searchsorted(self.selection.starts, number, "right")) - 1
        if part != self.part:
            self.part, self.images = part, read_images(Selection(self.selection.store, (self.selection.parts[part],)))
        return torch.from_numpy(self.images[number - self.selection.starts[part]])


def by_litdata(selection: Selection, folder: Path) -> Open:
    """Lightning's litdata."""
    import litdata

    numbers = list(range(selection.n_cells))
    litdata.optimize(
        EachImage(selection), numbers, str(folder / "data"), chunk_bytes=SHARD_BYTES, num_workers=1, verbose=False
    )

    def batches() -> Iterable[torch.Tensor]:
        data = litdata.StreamingDataset(str(folder / "data"), shuffle=True, drop_last=False)
        return litdata.StreamingDataLoader(data, batch_size=BATCH, num_workers=WORKERS, drop_last=True)

    return batches


def image_of(sample: dict[str, bytes]) -> torch.Tensor:
    """A sample of WebDataset as an image."""
    return torch.from_numpy(np.frombuffer(sample["bin"], np.uint8).reshape(60, 60, 3).copy())


def by_webdataset(selection: Selection, folder: Path) -> Open:
    """Tar files, a shuffle buffer of 10,000 images a worker."""
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=SHARD_BYTES // 12_288, verbose=0) as writer:
        numbers = itertools.count()
        for images in images_of(selection):
            for image in images:
                writer.write({"__key__": f"{next(numbers):09d}", "bin": image.tobytes()})
    urls = sorted(str(path) for path in folder.glob("*.tar"))

    def batches() -> Iterable[torch.Tensor]:
        data = webdataset.WebDataset(urls, shardshuffle=100, seed=0).shuffle(10_000).map(image_of)
        return webdataset.WebLoader(
            data.batched(BATCH, partial=False, collation_fn=torch.stack), batch_size=None, num_workers=WORKERS
        )

    return batches


def by_lance(selection: Selection, folder: Path) -> Open:
    """Lance, rows taken in a uniform order."""
    import lance
    import pyarrow as pa

    from lemon.cells.shard import images_from_arrow, images_to_arrow

    kind = pa.schema([pa.field("image", pa.binary(10_800))])
    batches_of = (pa.record_batch([images_to_arrow(images)], schema=kind) for images in images_of(selection))
    lance.write_dataset(pa.RecordBatchReader.from_batches(kind, batches_of), folder / "data.lance")

    def batches() -> Iterator[torch.Tensor]:
        data, order = lance.dataset(folder / "data.lance"), Permutation(selection.n_cells, seed=0)

        def take(step: int) -> torch.Tensor:
            rows = data.take(order.indices(step * BATCH, BATCH), columns=["image"])["image"]
            return torch.from_numpy(images_from_arrow(rows.combine_chunks()).copy())

        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(take, range(selection.n_cells // BATCH))

    return batches


def by_mosaic(selection: Selection, folder: Path) -> Open:
    """Mosaic's streaming (MDS), its default shuffling."""
    import streaming

    place = str(folder / "data")
    with streaming.MDSWriter(out=place, columns={"image": "bytes"}, size_limit=SHARD_BYTES) as writer:
        for images in images_of(selection):
            for image in images:
                writer.write({"image": image.tobytes()})

    def batches() -> Iterable[torch.Tensor]:
        streaming.base.util.clean_stale_shared_memory()
        data = streaming.StreamingDataset(local=place, shuffle=True, batch_size=BATCH)
        return torch.utils.data.DataLoader(
            data, batch_size=BATCH, num_workers=WORKERS, collate_fn=stacked, drop_last=True
        )

    return batches


def stacked(samples: list[dict[str, bytes]]) -> torch.Tensor:
    """Samples as a batch, uint8 [N, 60, 60, 3]."""
    return torch.from_numpy(np.stack([np.frombuffer(each["image"], np.uint8) for each in samples])).view(-1, 60, 60, 3)


def version_of(name: str) -> str:
    """Of the package."""
    return version({"lance": "pylance", "mosaic": "mosaicml-streaming"}.get(name, name)) if "lemon" not in name else ""


PEERS: dict[str, Callable[[Selection, Path], Open]] = {
    "lemon cache": by_cache,
    "lemon stream": by_stream,
    "litdata": by_litdata,
    "webdataset": by_webdataset,
    "lance": by_lance,
    "mosaic": by_mosaic,
}

if __name__ == "__main__":
    main()
