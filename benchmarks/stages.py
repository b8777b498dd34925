"""What a region of curation costs, stage by stage: CPU and device milliseconds on a pyramid made of real tissue.

python -m benchmarks.stages SLIDE [--side 20480] [--regions 64] [--batch 8] [KEY=VALUE ...]

The pyramid is SLIDE laid side by side until it is --side pixels wide and high: each piece from another place of it,
turned or mirrored, and lighter or darker by up to 15 %, at the slide's own um/px, compressed by deflate, which is read
at another rate than JPEG. Regions spread over it go through the stages one after another in one process, on one thread
(the network on those of torch): reading with resampling, the network, instances, crops, and writing the shard. CPU time
is of the whole process, device time by events of CUDA where there is a GPU. KEY=VALUE are settings of curation, as
segmenter=hoverfast, which is the default here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.record import record
from lemon.cells.crop import Frame, claim_cells
from lemon.cells.shard import SlideShard
from lemon.curate.config import CurateConfig
from lemon.curate.survey import read_region
from lemon.runtime.config import load
from lemon.runtime.store import Store
from lemon.schema import CELL_MPP
from lemon.slides.cohort import list_slides
from lemon.slides.reader import SlideReader
from lemon.slides.synthetic import write_pyramid
from lemon.slides.tiles import plan_regions, spread
from lemon.slides.tissue import OVERVIEW_MPP, find_tissue

STAGES = ("read", "network", "instances", "crops", "write")
PIECE_PX = 1024


class Costs:
    """CPU and device seconds of the stages."""

    def __init__(self) -> None:
        self.cpu_s, self.device_s = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        """Add what a block takes."""
        cuda = torch.cuda.is_available() and stage == "network"
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if cuda else []
        start = time.process_time()
        if events:
            torch.cuda.synchronize()
            events[0].record()
        yield
        if events:
            events[1].record()
            torch.cuda.synchronize()
            self.device_s[stage] += events[0].elapsed_time(events[1]) / 1e3
        self.cpu_s[stage] += time.process_time() - start


def main() -> None:
    """Make the pyramid, measure, print a table and record."""
    options = arguments()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pyramid.tiff"
        mpp = write_tiled(path, Path(options.slide), side_px=options.side)
        words = [f"slides={path}", f"output={folder}/cells", "segmenter=hoverfast", *options.settings]
        costs, counts = measure(load("curate", words, CurateConfig), n_regions=options.regions, batch=options.batch)
    n = counts["regions"]
    figures = {f"{stage}_cpu_ms": 1e3 * seconds / n for stage, seconds in costs.cpu_s.items()}
    device_ms = 1e3 * costs.device_s["network"] / n if torch.cuda.is_available() else None
    print(f"{'stage':<10} {'CPU ms':>8} {'device ms':>10}")
    for stage in STAGES:
        shown = f"{device_ms:10.2f}" if stage == "network" and device_ms is not None else f"{'-':>10}"
        print(f"{stage:<10} {figures[f'{stage}_cpu_ms']:8.1f} {shown}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    circumstances = {**vars(options), "slide": Path(options.slide).name, "mpp": mpp, "device_name": device, **counts}
    packages = ("torch", "opencv-python-headless", "openslide-python", "pyarrow")
    record("stages", {**circumstances, **figures, "network_device_ms": device_ms}, packages=packages)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", help="a slide with tissue, as CMU-1-Small-Region.svs")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of curation")
    parser.add_argument("--side", type=int, default=20_480, help="of the pyramid, px of its first level")
    parser.add_argument("--regions", type=int, default=64, help="that are measured, spread over the pyramid")
    parser.add_argument("--batch", type=int, default=8, help="regions that the network gets at a time")
    return parser.parse_args()


def write_tiled(path: Path, source: Path, *, side_px: int) -> float:
    """Write the pyramid (three levels, deflate); returns its um/px."""
    with SlideReader(source) as reader:
        mpp, tissue = reader.mpp, pieces_with_tissue(source)
    rng = np.random.default_rng(0)
    image = np.empty((side_px, side_px, 3), np.uint8)
    for y in range(0, side_px, PIECE_PX):
        for x in range(0, side_px, PIECE_PX):
            piece = np.rot90(tissue[rng.integers(len(tissue))], rng.integers(4))
            piece = piece[:, ::-1] if rng.random() < 0.5 else piece
            density = rng.uniform(0.85, 1.15)  # of the stain: a power of the light that comes through
            varied = 255 * (piece / 255.0) ** density
            image[y : y + PIECE_PX, x : x + PIECE_PX] = varied[: side_px - y, : side_px - x]
    write_pyramid(path, image, mpp=mpp)
    return mpp


def pieces_with_tissue(source: Path) -> np.ndarray:
    """Pieces of the slide's first level that are tissue for the most part, uint8 [N, PIECE_PX, PIECE_PX, 3]."""
    with SlideReader(source, mpp=CELL_MPP) as slide:  # at this um/px nothing is resampled
        steps = [np.linspace(0, px - PIECE_PX, 1 + 2 * (px // PIECE_PX)) for px in (slide.width_px, slide.height_px)]
        pieces = [
            slide.region(round(x), round(y), width_px=PIECE_PX, height_px=PIECE_PX) for y in steps[1] for x in steps[0]
        ]
    shares = [float((cv2.cvtColor(piece, cv2.COLOR_RGB2HSV)[..., 1] > 20).mean()) for piece in pieces]
    least = max(0.5, statistics.median(shares))
    return np.stack([piece for piece, share in zip(pieces, shares, strict=True) if share >= least])


def measure(config: CurateConfig, *, n_regions: int, batch: int) -> tuple[Costs, dict[str, int]]:
    """Regions of the slide of a config through all stages, and how many there were of what."""
    (slide,) = list_slides(config.slides)
    segmenter, costs, n_nuclei = config.segmenter.build(), Costs(), 0
    with SlideReader(slide.path) as reader, closing(SlideShard(keep=config.cells_per_slide)) as shard:
        overview, overview_mpp = reader.overview(mpp=OVERVIEW_MPP)
        planned = plan_regions(
            reader.bounds_base_px,
            size_px=config.region_px,
            overlap_px=config.overlap_px,
            tissue=find_tissue(overview, mpp=overview_mpp).mask,
            min_tissue_share=config.tissue.min_share,
        )
        regions = list(spread(planned, n_regions))
        frame = Frame(slide=slide, mpp=reader.mpp, scale=reader.scale, bounds_px=reader.bounds_base_px)
        warm = np.stack([read_region(reader, region) for region in regions[:2]])
        calibration = segmenter.calibrate(list(warm))
        segmenter.postprocess(warm[0], segmenter.predict(warm)[0], calibration)
        for start in range(0, len(regions), batch):
            group = regions[start : start + batch]
            with costs.of("read"):
                images = np.stack([read_region(reader, region) for region in group])
            with costs.of("network"):
                predictions = segmenter.predict(images)
            for region, image, prediction in zip(group, images, predictions, strict=True):
                with costs.of("instances"):
                    nuclei = segmenter.postprocess(image, prediction, calibration)
                with costs.of("crops"):
                    claims = claim_cells(image, nuclei, region=region, frame=frame, rank_below=shard.rank_below)
                with costs.of("write"):
                    shard.add(claims)
                n_nuclei += len(nuclei)
        with costs.of("write"):
            shard.commit(Store(config.output), "cells/pyramid.parquet")
    return costs, {"regions": len(regions), "planned": len(planned), "nuclei": n_nuclei}


if __name__ == "__main__":
    main()
