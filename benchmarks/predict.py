"""HoverFast.predict host to host against its network alone, on a GPU.

python -m benchmarks.predict [--batch 8 --regions 32 --parts 1 2 4] [--compile] [--checkpoint FILE]

A region is 1024x1024 px. The network alone runs on a batch that is on the device already, in the form that predict
uses. Without --checkpoint the weights are random, which does not change the time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import record
from lemon.nuclei import hoverfast

SHARED = Path(os.environ.get("LEMON_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def main() -> None:
    """Measure, print and record each figure as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(SHARED / "golden/hoverfast_random_weights.pth"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--regions", type=int, default=32)
    parser.add_argument(
        "--parts", type=int, nargs="+", default=[hoverfast.PART], help="regions at a time on the device"
    )
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    regions = np.random.default_rng(0).integers(0, 256, (options.regions, 1024, 1024, 3), np.uint8)
    segmenter = hoverfast.HoverFast(options.checkpoint, device="cuda", batch=options.batch, compiled=options.compile)
    for part in options.parts:
        hoverfast.PART = part
        network = network_ms(segmenter, part, compiled=options.compile)
        for count in (options.regions, options.batch):
            whole = best_ms(lambda count=count: segmenter.predict(regions[:count]), repeats=4) / count
            figures = {
                "part": part,
                "regions": count,
                "network_ms": network,
                "predict_ms": whole,
                "ratio": whole / network,
            }
            print(figures, flush=True)
            record("predict", {**vars(options), "gpu": torch.cuda.get_device_name(), **figures}, packages=("torch",))


@torch.inference_mode()
def network_ms(segmenter: hoverfast.HoverFast, part: int, *, compiled: bool) -> float:
    """Milliseconds a region of the network alone."""
    images = torch.rand(part, 3, 1024, 1024, device="cuda").to(segmenter.dtype, memory_format=torch.channels_last)
    net = torch.compile(segmenter.net, dynamic=False) if compiled else segmenter.net

    def run() -> None:
        for _ in range(16 // part):
            net(images)

    return best_ms(run, repeats=4) / (16 // part * part)


def best_ms(function: Callable[[], object], *, repeats: int) -> float:
    """Wall-clock milliseconds, the least of some repeats after one to warm up."""
    took = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        took.append(1e3 * (time.perf_counter() - start))
    return min(took[1:])


if __name__ == "__main__":
    main()
