"""What each encoder costs: parameters, arithmetic by two conventions, cells a second.

python -m benchmarks.cost [--models lemon resnet50 ...] [--device cuda --bf16] [--tflop 1] [--no-speed]

Weights are random, for speed and arithmetic do not depend on them. ``GFLOP`` counts a multiply-add as two and the
products of attention; ``paper GMAC`` is the convention of the LEMON paper. Each model encodes as many cells as take
about ``--tflop`` of arithmetic (two at least), from bytes in host memory to features.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.record import record
from lemon.encoders.architectures import build
from lemon.encoders.cost import Cost, cells_per_s, encoder_cost
from lemon.encoders.open import Encoder, cell_input_of
from lemon.encoders.registry import encoder_names, find_entry
from lemon.encoders.weights import MissingWeightsError


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=encoder_names(), metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tflop", type=float, default=1.0, help="arithmetic that sets the number of cells")
    parser.add_argument("--no-speed", action="store_true", help="count only")
    options = parser.parse_args()
    print(f"{'model':>20} {'input px':>8} {'width':>6} {'M param':>9} {'GFLOP':>9} {'paper GMAC':>10} {'cells/s':>9}")
    rows = [row for name in options.models if (row := measure(name, options))]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    threads = torch.get_num_threads()
    asked = {"device": options.device, "device_name": device, "threads": threads, "bf16": options.bf16}
    record("cost", {**asked, "models": rows}, packages=("torch", "timm"))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """One row, printed as soon as it is known; None where transformers is needed and absent."""
    entry = find_entry(name)
    try:
        cost = encoder_cost(name)
    except MissingWeightsError as error:
        print(f"{name:>20} {error}")
        return None
    speed = None if options.no_speed else speed_of(name, cost, options)
    shown = "-" if speed is None else f"{speed:,.1f}"
    print(
        f"{name:>20} {entry.input_px:>8} {entry.width:>6} {cost.parameters / 1e6:>9,.1f} {cost.flop / 1e9:>9,.2f} "
        f"{cost.paper_mac / 1e9:>10,.2f} {shown:>9}",
        flush=True,
    )
    figures = {"parameters": cost.parameters, "gflop": cost.flop / 1e9, "paper_gmac": cost.paper_mac / 1e9}
    return {"model": name, **figures, "cells_per_s": speed}


def speed_of(name: str, cost: Cost, options: argparse.Namespace) -> float:
    """Cells a second of a model with random weights."""
    entry = find_entry(name)
    encoder = Encoder(build(entry, device=options.device), cell_input_of(entry), name=name)
    cells = max(2, min(4096, int(options.tflop * 1e12 / cost.flop)))
    return cells_per_s(encoder, device=options.device, cells=cells, bf16=options.bf16)


if __name__ == "__main__":
    main()
