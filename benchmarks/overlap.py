"""Is the device busy? The real pipeline of curation on pyramids, with a device, cores and a disk that are simulated.

python -m benchmarks.overlap [--slides 1] [--regions 2000] [--network-ms 7] [--instances-ms 90] [--reading-ms 40]
    [--cpus 16 --readers 8 --batch 8] [--threads]

``lemon.curate.job.Curator`` works as in an actor: planning, threads that read, batches, the network in a thread of its
own, instances and crops on an executor, the shard; with several slides the next is looked at by another process. Its
costs are waits, which run beside each other as on a machine with enough cores: the network waits ``--network-ms`` a
region (HoverFast's time on an H100), reading ``--reading-ms`` in one of ``--readers`` threads, instances and crops
``--instances-ms`` in one of ``--cpus`` processes. What is measured is thus whether the pipeline keeps them apart, not
how fast any of them is; what the actor does itself (planning, stacking batches, handing regions of HoverFast's size to
processes) takes its true time. More processes than this machine has cores are slower than they should be;
``--threads`` has threads in their place, to which handing over costs nothing.
"""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import record
from lemon.curate.config import CurateConfig
from lemon.curate.job import Curator, LocatedSlide, open_ledger
from lemon.nuclei.instances import HVPrediction, Nucleus
from lemon.nuclei.segmenter import Postprocess
from lemon.runtime import pool
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import SlideRow
from lemon.slides.cohort import Slide
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import make_tissue, write_pyramid

STAGES = ("open_s", "read_s", "network_s", "instances_s", "write_s")
COARSE = 3  # pixels at 0.25 um/px a pixel of the file, at 0.75 um/px: a large slide in a small file


def main() -> None:
    """Curate the pyramid, print and record."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        rows, seconds = curate(options, Path(folder))
    stages = {name: sum(getattr(row, name) for row in rows) for name in STAGES}
    n_regions, busy = sum(row.n_regions or 0 for row in rows), stages["network_s"] / seconds
    print(
        f"{len(rows)} slides, {n_regions} regions in {seconds:.1f} s: the device was busy {busy:.1%}; "
        f"opening {stages['open_s']:.1f} s, network {stages['network_s']:.1f} s, "
        f"instances {stages['instances_s']:.0f} s and reading {stages['read_s']:.0f} s in parallel"
    )
    figures = {"n_regions": n_regions, "total_s": round(seconds, 3), "device_share": round(busy, 4)}
    record("overlap", {**vars(options), **figures, **stages}, packages=("numpy", "pyarrow"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=1)
    parser.add_argument("--regions", type=int, default=2000, help="about as many regions of 1024 px, of each slide")
    parser.add_argument("--network-ms", type=float, default=7.0, help="of the device, a region")
    parser.add_argument("--instances-ms", type=float, default=90.0, help="of a core, a region, with crops")
    parser.add_argument("--reading-ms", type=float, default=40.0, help="of a thread, a region")
    parser.add_argument("--cpus", type=int, default=16, help="workers.cpus")
    parser.add_argument("--readers", type=int, default=8, help="workers.readers")
    parser.add_argument("--batch", type=int, default=8, help="segmenter.batch")
    parser.add_argument("--threads", action="store_true", help="in place of processes")
    return parser.parse_args()


def curate(options: argparse.Namespace, folder: Path) -> tuple[list[SlideRow], float]:
    """The rows of the slides, and seconds that an actor took for them that had worked on another before."""
    first, path = folder / "first.tiff", folder / "pyramid.tiff"
    write_tissue(first, n_regions=20 * options.cpus)
    write_tissue(path, n_regions=options.regions)
    words = [f"workers.cpus={options.cpus}", f"workers.readers={options.readers}", f"segmenter.batch={options.batch}"]
    words += [f"slides={path}", f"output={folder / 'cells'}", "segmenter=hoverfast"]
    config = load("curate", words, CurateConfig)
    slides = [LocatedSlide(Slide(f"s{index}", str(path)), str(path)) for index in range(options.slides)]
    SlideReader.region = functools.partialmethod(wait_and_make, seconds=options.reading_ms / 1e3)  # type: ignore[assignment]
    curator, turn = SimulatedCurator(config, options), threading.Lock()
    work = functools.partial(pool._work_on_item, worker=curator, run_id="run", max_attempts=1, turn=turn)
    work(LocatedSlide(Slide("first", str(first)), str(first)))  # 16 processes that begin are more than two cores hold
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as threads:  # as many as Ray gives an actor that gets one slide ready ahead
        rows = [row for row in threads.map(work, slides) if row is not None]
    return rows, time.perf_counter() - start


class SimulatedCurator(Curator):
    """A curator whose segmenter only takes time."""

    def __init__(self, config: CurateConfig, options: argparse.Namespace) -> None:
        ledger = open_ledger(Store(config.output), config)
        super().__init__(config, ledger=ledger, surveys_ahead=options.slides > 1)
        if options.threads:
            self.processes.shutdown()
            self.processes = ThreadPoolExecutor(options.cpus)
        self.segmenter = Simulated(network_s=options.network_ms / 1e3, instances_s=options.instances_ms / 1e3)


def write_tissue(path: Path, *, n_regions: int) -> None:
    """A pyramid of synthetic tissue, the same piece again and again, that plans to about ``n_regions`` regions."""
    side_px = math.ceil(math.sqrt(n_regions)) * (1024 - 128) // COARSE
    piece = make_tissue(512, seed=0, border_px=0).image // 8 * 8  # fewer colours: a small file
    repeats = math.ceil(side_px / len(piece))
    write_pyramid(path, np.tile(piece, (repeats, repeats, 1))[:side_px, :side_px], mpp=0.25 * COARSE)


def wait_and_make(_: SlideReader, *at_px: int, seconds: float, **size: int) -> np.ndarray:  # noqa: ARG001
    """Pixels of a region, uint8 [H, W, 3], after a while."""
    time.sleep(seconds)
    return grey(size["height_px"])


@functools.cache
def grey(side_px: int) -> np.ndarray:
    """The same pixels each time, so that this process has little to do."""
    return np.full((side_px, side_px, 3), 200, np.uint8)


@functools.cache
def nothing(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Probability uint8 [B, H, W] and gradients int16 [B, 2, H, W]."""
    return np.zeros(shape, np.uint8), np.zeros((shape[0], 2, *shape[1:]), np.int16)


class Simulated:
    """A segmenter whose device and whose cores only take time."""

    def __init__(self, *, network_s: float, instances_s: float) -> None:
        self._network_s, self._instances_s = network_s, instances_s

    def calibrate(self, samples: Sequence[np.ndarray]) -> None:
        """Nothing to calibrate."""

    def predict(self, regions: np.ndarray) -> list[Any]:
        """What HoverFast would say where there is no nucleus, after the time of the network for these regions."""
        time.sleep(self._network_s * len(regions))
        shape = regions.shape[:3]
        return [HVPrediction(*each) for each in zip(*nothing(shape), strict=True)]

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
