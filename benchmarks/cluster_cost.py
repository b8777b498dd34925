"""What a study costs on a cluster: hours of cores and GPUs by the measured rates, and money where prices are given.

python -m benchmarks.cluster_cost --gpu-tflops 121 [--cpu-price P --gpu-price P] [--slides 10000 --images 150000000 ...]

Rates of curation are the newest lines of ``benchmarks/results`` (CPU, this project's machine: cores differ). No GPU was
measured: its hours are arithmetic over ``--gpu-tflops`` (the peak of one GPU, bf16, dense, from its data sheet) times
``--mfu``, an assumption. The arithmetic of a pretraining image (ViT-S/8, MoCo v3 with its heads) and of a HoverFast
region is counted. Prices are dollars an hour of a whole node, as you pay them; none is built in.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from benchmarks.record import RESULTS

REGION_PX, OVERLAP_PX, MPP = 1024, 128, 0.25  # of curation; lemon/curate/config.py
REGION_MM2 = ((REGION_PX - OVERLAP_PX) * MPP / 1000) ** 2  # of tissue that a region adds, its overlap taken off
GFLOP_AN_IMAGE = 9.3  # two views, student forward and backward, teacher forward, heads; python -m benchmarks.pretrain
HEMATOXYLIN_MM2 = ((1500 - 2 * 60) * MPP / 1000) ** 2  # tissue of a slide of benchmarks.memory


@dataclass(frozen=True)
class Row:
    """A stage on one kind of node."""

    stage: str
    unit: str
    hours: float
    node_hours: float
    price: float | None

    def __str__(self) -> str:
        cost = "-" if self.price is None else f"${self.node_hours * self.price:,.0f}"
        return f"{self.stage:<34} {self.hours:>10,.1f} {self.unit}-hours {self.node_hours:>9,.1f} node-hours {cost:>10}"


def newest(name: str) -> dict[str, Any]:
    """The last line of a file of results."""
    return json.loads((RESULTS / f"{name}.jsonl").read_text().splitlines()[-1])


def core_s_a_mm2() -> dict[str, float]:
    """Core seconds a mm2 of tissue, by segmenter, from the files of results."""
    runs = newest("memory")["runs"]
    few, many = runs[-2], runs[-1]
    slide_s = (many["seconds"] - few["seconds"]) / (many["copies"] - few["copies"])  # start-up taken off; two cores
    return {
        "hematoxylin": 2 * slide_s / HEMATOXYLIN_MM2,
        "hoverfast": newest("hoverfast")["lemon"]["cpu_s"] / REGION_MM2,
    }


def estimate(options: argparse.Namespace) -> list[Row]:
    """Hours and money of each stage, and of the alternatives for curation."""
    tissue_mm2 = options.slides * options.tissue_mm2
    rows = []
    for name, core_s in core_s_a_mm2().items():
        hours = tissue_mm2 * core_s / 3600
        rows.append(Row(f"curate, {name}, CPU", "core", hours, hours / options.cpu_cores, options.cpu_price))
    region_gflop = newest("hoverfast")["gflop_a_tile"]
    for stage, gflop in {
        "curate, hoverfast, GPU (arithmetic)": tissue_mm2 / REGION_MM2 * region_gflop,
        "pretrain, ViT-S/8 (arithmetic)": options.images * GFLOP_AN_IMAGE,
    }.items():
        hours = gflop / (options.gpu_tflops * 1000 * options.mfu) / 3600
        rows.append(Row(stage, "GPU", hours, hours / options.gpus, options.gpu_price))
    return rows


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--tissue-mm2", type=float, default=150.0, help="of a slide; an assumption: measure yours")
    parser.add_argument("--images", type=float, default=150e6, help="of pretraining: epochs x images_per_epoch")
    parser.add_argument("--gpu-tflops", type=float, required=True, help="peak of one GPU, bf16, dense")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak that is reached; an assumption")
    parser.add_argument("--cpu-cores", type=int, default=32, help="of a CPU node")
    parser.add_argument("--gpus", type=int, default=4, help="of a GPU node")
    parser.add_argument("--cpu-price", type=float, help="dollars an hour of a CPU node")
    parser.add_argument("--gpu-price", type=float, help="dollars an hour of a GPU node")
    return parser.parse_args(words)


def main() -> None:
    """Print the table."""
    options = parse()
    print(
        f"{options.slides:,} slides of {options.tissue_mm2:g} mm2 tissue (assumed), {options.images:,.0f} images; GPU "
        f"of {options.gpu_tflops:g} TFLOP/s at {options.mfu:.0%} (assumed)"
    )
    for row in estimate(options):
        print(row)


if __name__ == "__main__":
    main()
