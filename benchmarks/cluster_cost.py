"""What a study costs on the cluster of cluster/aws.yaml: hours of cores and cards by measured rates, and dollars.

python -m benchmarks.cluster_cost [--slides 10000 --tissue-mm2 150 --images 1.5e8 ...]
python -m benchmarks.cluster_cost --measure        (curates synthetic slides of three sizes; minutes)

Curation on cores: the newest line of ``benchmarks/results/curation.jsonl``, which ``--measure`` adds. Processor time
a slide is fitted as fixed + a mm2 of tissue, by least squares over slides of three sizes: on small slides alone the
fixed part would be taken for tissue. Cards: this project's H100 lines of ``benchmarks/results`` (HoverFast.predict from
host to host, MoCo v3 steps, encode_cells). An L4 was not measured: an H100's network time times ``--l4``, the ratio of
the cards' memory (3.35 TB/s by 0.3, data sheets), which is above that of their arithmetic (8). Prices of nodes:
``benchmarks/prices.yaml``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.record import RESULTS, record
from lemon.curate.config import CurateConfig
from lemon.curate.job import OUTPUT_NAMES, Curator, LocatedSlide, open_ledger
from lemon.runtime.config import load
from lemon.runtime.lease import hold
from lemon.slides.cohort import list_slides
from lemon.slides.synthetic import make_tissue, write_pyramid

REGION_PX, OVERLAP_PX, MPP = 1024, 128, 0.25  # of curation; lemon/curate/config.py
REGION_MM2 = ((REGION_PX - OVERLAP_PX) * MPP / 1000) ** 2  # of tissue that a region adds, its overlap taken off
CELL_GB = 60 * 60 * 3 / 1e9
PRICES = Path(__file__).with_name("prices.yaml")
SIDES_PX, BORDER_PX = {"hematoxylin": (1500, 2500, 4000), "hoverfast": (1500, 2000, 3000)}, 60
CPUS_A_CORE = 2  # of the nodes of cluster/aws.yaml: Ray's CPUs are hardware threads


# --- measuring curation -----------------------------------------------------------------------------------------------


def measure() -> None:
    """Curate slides of three sizes by each segmenter and record the processor time of each."""
    slides = []
    for segmenter, sides_px in SIDES_PX.items():
        with tempfile.TemporaryDirectory() as folder:
            for row in curate_sizes(Path(folder), segmenter, sides_px):
                print(
                    f"{segmenter:<12} {row['tissue_mm2']:>6.2f} mm2 {row['cpu_s']:>7.1f} core-s; "
                    f"without the network {row['behind_s']:.1f} s",
                    flush=True,
                )
                slides.append(row)
    record("curation", {"slides": slides}, packages=("torch", "opencv-python-headless", "pyarrow"))


def curate_sizes(folder: Path, segmenter: str, sides_px: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One slide after another in this process, after one that is not counted: imports, weights, thread pools."""
    for number, side_px in enumerate((sides_px[0], *sides_px)):
        tissue = make_tissue(side_px, seed=number, border_px=BORDER_PX).image
        write_pyramid(folder / f"s{number}_{side_px}.tiff", tissue, mpp=MPP)
    words = [f"slides={folder}", f"output={folder / 'cells'}", f"segmenter={segmenter}", "workers.cpus=1"]
    config = load("curate", words, CurateConfig)
    with hold(config.output, stage="curate", names=OUTPUT_NAMES) as store:
        curator = Curator(config, ledger=open_ledger(store, config))
        for number, slide in enumerate(list_slides(config.slides)):
            before = processor_s()
            row = curator.work(LocatedSlide(slide, slide.path))
            if row.status != "done":
                raise SystemExit(f"cluster_cost: {slide.slide_id}: {row.error}")
            if number:
                side_mm = (sides_px[number - 1] - 2 * BORDER_PX) * MPP / 1000
                behind = [row.read_s, row.instances_s, row.write_s]
                yield {
                    "segmenter": segmenter,
                    "tissue_mm2": side_mm**2,
                    "cpu_s": processor_s() - before,
                    "behind_s": sum(seconds or 0.0 for seconds in behind),
                }


def processor_s() -> float:
    """Processor time of this process and its children so far."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time.user + time.system for time in times)


# --- what it comes to -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A stage on one kind of node."""

    stage: str
    node: str
    amount: str
    node_hours: float


def newest(name: str, **having: Any) -> dict[str, Any]:
    """The last line of a file of results that has these values."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        raise SystemExit(f"cluster_cost: {path.name} is not measured yet: python -m benchmarks.cluster_cost --measure")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next(line for line in reversed(lines) if having.items() <= line.items())


def fit(slides: list[dict[str, Any]], segmenter: str, figure: str) -> tuple[float, float]:
    """Seconds of a slide, and of a mm2 of its tissue, by least squares; neither is below 0."""
    rows = [row for row in slides if row["segmenter"] == segmenter]
    a_mm2, a_slide = np.polyfit([row["tissue_mm2"] for row in rows], [row[figure] for row in rows], 1)
    return max(0.0, float(a_slide)), max(0.0, float(a_mm2))


def estimate(options: argparse.Namespace) -> list[Line]:
    """Hours of each stage, and of the alternatives for curation."""
    nodes, slides = yaml.safe_load(PRICES.read_text())["nodes"], newest("curation")["slides"]
    lines = []
    for segmenter in SIDES_PX:
        a_slide, a_mm2 = fit(slides, segmenter, "cpu_s")
        hours = options.slides * (a_slide + a_mm2 * options.tissue_mm2) / 3600
        cores = nodes["cpu"]["cpus"] / CPUS_A_CORE * options.busy
        lines.append(Line(f"curate, {segmenter}", "cpu", f"{hours:,.0f} core-hours", hours / cores))
    regions = options.slides * options.tissue_mm2 / REGION_MM2
    region_s = newest("predict", regions=32)["predict_ms"] / 1000 * options.l4
    behind_s = fit(slides, "hoverfast", "behind_s")[1] * REGION_MM2 / (nodes["gpu"]["cpus"] / CPUS_A_CORE)
    hours = regions * max(region_s, behind_s) / 3600  # whatever is slower, the card or the cores beside it
    lines.append(Line("curate, hoverfast on L4", "gpu", f"{hours:,.0f} card-hours", hours))
    rate = newest("pretrain", method="mocov3", batch=4096)["step_images_per_s"]
    hours = options.images / rate / 3600
    lines.append(Line("pretrain, ViT-S/8, MoCo v3", "train", f"{hours:,.1f} card-hours", hours))
    hours = (
        options.slides * options.cells_per_slide / newest("encode_cells", bf16=True, batch=4096)["cells_per_s"] / 3600
    )
    lines.append(Line("embed the cells", "train", f"{hours:,.2f} card-hours", hours))
    return lines


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure curation in place of the table")
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--tissue-mm2", type=float, default=150.0, help="of a slide; an assumption: measure yours")
    parser.add_argument("--cells-per-slide", type=int, default=1000)
    parser.add_argument("--images", type=float, default=150e6, help="of pretraining: epochs x images_per_epoch")
    parser.add_argument("--busy", type=float, default=0.7, help="share of a node's cores at work; an assumption")
    parser.add_argument("--l4", type=float, default=3.35 / 0.3, help="an L4's time by an H100's; an assumption")
    return parser.parse_args(words)


def dollars(hours: float, price: float | None) -> str:
    """What hours cost; a dash where there is no price."""
    return "-" if price is None else f"${hours * price:,.0f}"


def report(options: argparse.Namespace) -> Iterator[str]:
    """The table, then what comes on top."""
    prices, lines = yaml.safe_load(PRICES.read_text()), estimate(options)
    yield (
        f"{options.slides:,} slides of {options.tissue_mm2:g} mm2 tissue, cores at work {options.busy:.0%}, an L4 "
        f"{options.l4:.1f} times an H100's time (all assumed); {options.images:,.0f} images"
    )
    yield f"{'stage':<28} {'node':<12} {'':>19} {'node-hours':>11} {'on demand':>10} {'spot':>8}"
    for line in lines:
        node = prices["nodes"][line.node]
        asked = [dollars(line.node_hours, node[kind]) for kind in ("on_demand", "spot")]
        hours = f"{line.amount:>19} {line.node_hours:>11,.1f}"
        yield f"{line.stage:<28} {node['type']:<12} {hours} {asked[0]:>10} {asked[1]:>8}"
    for segmenter in SIDES_PX:
        a_slide, a_mm2 = fit(newest("curation")["slides"], segmenter, "cpu_s")
        yield f"{segmenter}: {a_slide:.2f} core-s a slide and {a_mm2:.2f} a mm2"
    size_gb = options.slides * options.cells_per_slide * CELL_GB
    for what, amount, price in (
        ("head, an hour of the cluster", 1, prices["nodes"]["head"]["on_demand"]),
        (f"cells in S3, {size_gb:,.0f} GB, a month", size_gb, prices["s3_gb_month"]),
        ("database, a month of 730 hours", 730, prices["database_hour"]),
    ):
        yield f"{what}: {'fill in benchmarks/prices.yaml' if price is None else f'${amount * price:,.2f}'}"


def main() -> None:
    """Print the table, or measure."""
    options = parse()
    if options.measure:
        measure()
        return
    for line in report(options):
        print(line)


if __name__ == "__main__":
    main()
