"""Is the device busy? The real pipeline of curation on one pyramid, with a device, cores and a disk that are simulated.

python -m benchmarks.overlap [--regions 2000] [--network-ms 7] [--instances-ms 90] [--reading-ms 40]
    [--cpus 16 --readers 8 --batch 8]

``lemon.curate.slide.curate_slide`` runs as in an actor: planning, threads that read, batches, the network in a thread
of its own, instances and crops on an executor, the shard. Its costs are waits, which run beside each other as on a
machine with enough cores: the network waits ``--network-ms`` a region (HoverFast's time on an H100), reading
``--reading-ms`` in one of ``--readers`` threads, instances and crops ``--instances-ms`` in one of ``--cpus``. What is
measured is thus whether the pipeline keeps them apart, not how fast any of them is; what this process does itself
(stacking batches, planning) takes its true time. Device-busy share and seconds are those of the ledger's row.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from lemon.curate import slide as curation
from lemon.curate.config import CurateConfig
from lemon.nuclei.instances import Nucleus
from lemon.nuclei.segmenter import Postprocess
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from lemon.slides.cohort import list_slides
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid
from lemon.slides.tiles import Region

COARSE = 3  # pixels at 0.25 um/px a pixel of the file, at 0.75 um/px: a large slide in a small file


def main() -> None:
    """Curate the pyramid, print and record."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        row = curate(options, Path(folder))
    busy = row.device_share or 0.0
    print(
        f"{row.n_regions} regions in {row.total_s:.1f} s: the device was busy {busy:.1%}; opening {row.open_s:.1f} s, "
        f"network {row.network_s:.1f} s, instances {row.instances_s:.0f} s and reading {row.read_s:.0f} s in parallel"
    )
    figures = {"n_regions": row.n_regions, "total_s": row.total_s, "device_share": busy}
    stages = {name: getattr(row, name) for name in ("open_s", "read_s", "network_s", "instances_s", "write_s")}
    record("overlap", {**vars(options), **figures, **stages}, packages=("numpy", "pyarrow"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=2000, help="about as many regions of 1024 px")
    parser.add_argument("--network-ms", type=float, default=7.0, help="of the device, a region")
    parser.add_argument("--instances-ms", type=float, default=90.0, help="of a core, a region, with crops")
    parser.add_argument("--reading-ms", type=float, default=40.0, help="of a thread, a region")
    parser.add_argument("--cpus", type=int, default=16, help="workers.cpus")
    parser.add_argument("--readers", type=int, default=8, help="workers.readers")
    parser.add_argument("--batch", type=int, default=8, help="segmenter.batch")
    return parser.parse_args()


def curate(options: argparse.Namespace, folder: Path) -> SlideRow:
    """The row of the pyramid."""
    path = folder / "pyramid.tiff"
    write_tissue(path, n_regions=options.regions)
    words = [f"workers.cpus={options.cpus}", f"workers.readers={options.readers}", f"segmenter.batch={options.batch}"]
    config = load(
        "curate", [f"slides={path}", f"output={folder / 'cells'}", "segmenter=hoverfast", *words], CurateConfig
    )
    (slide,) = list_slides(str(path))
    curation._read = functools.partial(wait_and_read, seconds=options.reading_ms / 1e3)
    with ThreadPoolExecutor(options.cpus) as processes:
        return curation.curate_slide(
            slide,
            config=config,
            segmenter=Simulated(network_s=options.network_ms / 1e3, instances_s=options.instances_ms / 1e3),
            processes=processes,
            store=Store(config.output),
        )


def write_tissue(path: Path, *, n_regions: int) -> None:
    """A pyramid of synthetic tissue, the same piece again and again, that plans to about ``n_regions`` regions."""
    side_px = math.ceil(math.sqrt(n_regions)) * (1024 - 128) // COARSE
    piece = make_tissue(512, seed=0, border_px=0).image // 8 * 8  # fewer colours: a small file
    repeats = math.ceil(side_px / len(piece))
    write_pyramid(path, np.tile(piece, (repeats, repeats, 1))[:side_px, :side_px], mpp=0.25 * COARSE)


def wait_and_read(reader: SlideReader, region: Region, *, seconds: float) -> np.ndarray:  # noqa: ARG001
    """Pixels of a region, uint8 [H, W, 3], after a while."""
    time.sleep(seconds)
    return grey(region.size_px)


@functools.cache
def grey(side_px: int) -> np.ndarray:
    """The same pixels each time, so that this process has little to do."""
    return np.full((side_px, side_px, 3), 200, np.uint8)


class Simulated:
    """A segmenter whose device and whose cores only take time."""

    def __init__(self, *, network_s: float, instances_s: float) -> None:
        self._network_s, self._instances_s = network_s, instances_s

    def calibrate(self, samples: Sequence[np.ndarray]) -> None:
        """Nothing to calibrate."""

    def predict(self, regions: np.ndarray) -> list[Any]:
        """Nothing, after the time of the network for these regions."""
        time.sleep(self._network_s * len(regions))
        return [None] * len(regions)

    @property
    def postprocess(self) -> Postprocess:
        """No nuclei, after the time of a core."""
        return functools.partial(wait_for_instances, seconds=self._instances_s)


def wait_for_instances(*_: Any, seconds: float) -> list[Nucleus]:
    """No nuclei, after a while."""
    time.sleep(seconds)
    return []


if __name__ == "__main__":
    main()
