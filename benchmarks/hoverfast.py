"""HoverFast on a CPU: this project's segmenter against the plain network and a plain reading of the post-processing.

python -m benchmarks.hoverfast [--tile IMAGE] [--checkpoint FILE] [--rounds 5] [--tiles 2] [--keep-pages]
python -m benchmarks.hoverfast --postprocessing [--rounds 40]

One unit of work is one 1024x1024 tile, from pixels to polygons. The peer is the same network as it is loaded (fp32,
NCHW, batch norm apart) followed in the same process by post-processing of the whole image. Ours is the segmenter as
the pipeline runs it: the network in strips, post-processing in a worker process beside the next tile's network.
Both sides have the same number of threads and take turns within one process; figures are medians over rounds, by wall
clock and by CPU time (of all processes). On a machine with other work the latter is the fairer.

Without --checkpoint the weights are random, and so would be their nuclei: the networks then run on the tile, and the
post-processing of both sides is given the reference's maps (LEMON_SHARED, golden), which are like a trained network's.

--postprocessing leaves the network out: CPU time, on one thread and in turns, of the plain post-processing of the
golden maps, of its gradients as they are on a CPU, of ours from gradients, and of ours by level, the default.

Plain PyTorch asks the system for fresh pages for every large activation, which can take a third of its CPU time.
--keep-pages (glibc only) has the process keep them, for both sides, and so shows what the arithmetic alone gains.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.measure import regionprops
from skimage.segmentation import watershed
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.record import record
from lemon.nuclei.hoverfast import HoverFast, HoverFastNet, load_checkpoint
from lemon.nuclei.hoverfast_device import hv_gradients
from lemon.nuclei.instances import HVPrediction, find_nuclei
from lemon.nuclei.levels import postprocess_by_level
from lemon.nuclei.segmenter import Postprocess

SHARED = Path(os.environ.get("LEMON_SHARED", Path(__file__).resolve().parents[2] / "shared"))
TILE_PX = 1024
MIN_AREA_PX = 80.0  # 5 um2 at 0.25 um/px


def main() -> None:
    """Measure, print both sides and their ratio, and append a JSON line to benchmarks/results/hoverfast.jsonl."""
    options = arguments()
    cv2.setNumThreads(1)
    if options.keep_pages:
        keep_pages()
    weights = options.checkpoint or str(SHARED / "golden/hoverfast_random_weights.pth")
    if not Path(weights).is_file():
        raise SystemExit(f"{weights}: no such checkpoint; name one with --checkpoint, or set LEMON_SHARED")
    if options.postprocessing:
        compare_postprocessing(rounds=options.rounds)
        return
    given = None if options.checkpoint else golden()
    tile = read_tile(options.tile)
    plain, segmenter = load_checkpoint(weights), HoverFast(weights, device="cpu", batch=options.tiles, markers="range")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "peer": lambda: run_peer(plain, tile, given=given),
            "lemon": lambda: run_lemon(segmenter, tile, tiles=options.tiles, given=given, processes=processes),
        }
        figures = measure(sides, rounds=options.rounds)
    figures |= compare(plain, segmenter, tile, given=given)
    report(figures)
    circumstances = {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "tiles_a_round": options.tiles,
        "keep_pages": options.keep_pages,
        "tile": Path(options.tile).name if options.tile else "golden, repeated",
        "weights": Path(weights).name,
        "postprocessing_input": "own predictions" if given is None else "golden maps",
    }
    print(circumstances)
    record("hoverfast", circumstances | figures, packages=("torch", "opencv-python-headless", "scikit-image", "numpy"))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", help="an RGB image of at least 1024x1024 px (default: the golden image, repeated)")
    parser.add_argument("--checkpoint", help="a HoverFast checkpoint (default: the golden random weights)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiles", type=int, default=2, help="tiles a round on our side, so that stages can overlap")
    parser.add_argument("--postprocessing", action="store_true", help="only post-processing, of the golden maps")
    parser.add_argument("--keep-pages", action="store_true", help="never give memory back to the system")
    return parser.parse_args()


def keep_pages() -> None:
    """Have glibc's malloc serve every size from a heap that is never trimmed."""
    max_mmaps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(max_mmaps, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("--keep-pages: this C library has no such setting")


def read_tile(path: str | None) -> np.ndarray:
    """uint8 [1024, 1024, 3]."""
    if path is None:
        return np.tile(np.load(SHARED / "golden/hoverfast_forward.npz")["image"], (4, 4, 1))
    image = np.asarray(Image.open(path).convert("RGB"))
    if min(image.shape[:2]) < TILE_PX:
        raise SystemExit(f"--tile: got {image.shape[1]}x{image.shape[0]} px, expected at least {TILE_PX}x{TILE_PX}")
    return np.ascontiguousarray(image[:TILE_PX, :TILE_PX])


@dataclass(frozen=True)
class Given:
    """Mask bool [H, W] and maps float16 [2, H, W] that are like a trained network's, and what LEMON makes of them."""

    mask: np.ndarray
    hv_maps: np.ndarray
    prediction: HVPrediction


def golden() -> Given:
    """The reference's maps."""
    stored = np.load(SHARED / "golden/hoverfast_postprocess_input.npz")
    gradients = hv_gradients(torch.from_numpy(stored["hv"])[None])[0].numpy()
    mask = np.unpackbits(stored["mask"], count=gradients[0].size).reshape(gradients[0].shape)
    prediction = HVPrediction(255 * mask, gradients)
    return Given(prediction.mask, stored["hv"], prediction)


@torch.inference_mode()
def run_peer(net: HoverFastNet, tile: np.ndarray, *, given: Given | None) -> dict[str, float]:
    """Seconds of one tile, stage by stage."""
    with Clock() as network:
        logits, maps = net(torch.from_numpy(tile).permute(2, 0, 1)[None].float().contiguous() / 255)
        mask, hv_maps = logits[0].argmax(0).bool().numpy(), maps[0].numpy()
    if given is not None:
        mask, hv_maps = given.mask, given.hv_maps
    with Clock() as postprocessing:
        plain_postprocessing(mask, hv_maps, min_area_px=MIN_AREA_PX)
    return {
        "wall_s": network.wall_s + postprocessing.wall_s,
        "cpu_s": network.cpu_s + postprocessing.cpu_s,
        "network_cpu_s": network.cpu_s,
        "postprocessing_cpu_s": postprocessing.cpu_s,
        "page_faults": network.page_faults,
    }


def run_lemon(
    segmenter: HoverFast, tile: np.ndarray, *, tiles: int, given: Given | None, processes: ProcessPoolExecutor
) -> dict[str, float]:
    """Seconds a tile of several, post-processing beside the network."""
    pending: list[Future[float]] = []
    with Clock() as whole:
        for _ in range(tiles):
            predicted = segmenter.predict(tile[None])[0]
            pending.append(
                processes.submit(timed, segmenter.postprocess, tile, given.prediction if given else predicted)
            )
        behind = [future.result() for future in pending]
    return {
        "wall_s": whole.wall_s / tiles,
        "cpu_s": (whole.cpu_s + sum(behind)) / tiles,
        "network_cpu_s": whole.cpu_s / tiles,
        "postprocessing_cpu_s": sum(behind) / tiles,
        "page_faults": whole.page_faults / tiles,
    }


def compare_postprocessing(*, rounds: int) -> None:
    """Print and record milliseconds of CPU, medians over rounds in which all take turns, and ratios within rounds."""
    torch.set_num_threads(1)
    maps, given = np.load(SHARED / "golden/hoverfast_postprocess_input.npz")["hv"], golden()
    gradients, tile = given.prediction.gradients, np.zeros((*given.mask.shape, 3), np.uint8)
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: plain_postprocessing(given.mask, maps, min_area_px=MIN_AREA_PX),
        "gradients": lambda: hv_gradients(torch.from_numpy(maps)[None]),
        "range": lambda: find_nuclei(given.mask, gradients, min_area_px=MIN_AREA_PX),
        "level": lambda: postprocess_by_level(tile, given.prediction, None, min_area_px=MIN_AREA_PX),
    }
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            with Clock() as clock:
                run()
            seconds[name].append(clock.cpu_s)
    figures: dict[str, float] = {f"{name}_cpu_ms": 1e3 * statistics.median(of) for name, of in seconds.items()}
    for name in ("range", "level"):
        ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds[name], strict=True)]
        figures[f"ratio_{name}"] = statistics.median(ratios)
    print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    circumstances = {"part": "postprocessing", "threads": 1, "rounds": rounds, "tile": "golden"}
    record("hoverfast", circumstances | figures, packages=("opencv-python-headless", "scikit-image", "numpy"))


def timed(work: Postprocess, tile: np.ndarray, prediction: HVPrediction) -> float:
    """What the worker process does; the CPU seconds that it took."""
    start = time.process_time()
    work(tile, prediction, None)
    return time.process_time() - start


class Clock:
    """Wall and CPU time and page faults of a block, of this process and its threads."""

    def __enter__(self) -> Clock:
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_s, self.cpu_s = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.page_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults


def measure(sides: dict[str, Callable[[], dict[str, float]]], *, rounds: int) -> dict[str, Any]:
    """Medians of each side over rounds in which both take turns, and the medians of the ratios within rounds."""
    for run in sides.values():
        run()  # allocators, thread pools, the worker's imports
    runs = [{name: run() for name, run in sides.items()} for _ in range(rounds)]
    figures: dict[str, Any] = {
        name: {key: statistics.median(one[name][key] for one in runs) for key in runs[0][name]} for name in sides
    }
    for clock in ("wall_s", "cpu_s"):
        ratios = [one["peer"][clock] / one["lemon"][clock] for one in runs]
        figures[f"ratio_{clock}"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return figures


@torch.inference_mode()
def compare(net: HoverFastNet, segmenter: HoverFast, tile: np.ndarray, *, given: Given | None) -> dict[str, Any]:
    """How far the two sides' results are apart, and the arithmetic of one tile."""
    x = torch.from_numpy(tile).permute(2, 0, 1)[None].float().contiguous() / 255
    with FlopCounterMode(display=False) as counter:
        expected = net(x)
    differences = [(a - b).abs().max().item() for a, b in zip(segmenter.net(x), expected, strict=True)]
    mask, hv_maps = (given.mask, given.hv_maps) if given else (expected[0][0].argmax(0).numpy(), expected[1][0].numpy())
    plain = plain_postprocessing(mask, hv_maps, min_area_px=MIN_AREA_PX)
    gradients = hv_gradients(torch.from_numpy(hv_maps)[None])[0].numpy()
    ours = [n.contour_px for n in find_nuclei(mask, gradients, min_area_px=MIN_AREA_PX)]
    return {
        "gflop_a_tile": counter.get_total_flops() / 1e9,
        "largest_difference_logits": differences[0],
        "largest_difference_maps": differences[1],
        "nuclei": len(ours),
        "nuclei_peer": len(plain),
        "polygons_equal": len({c.tobytes() for c in ours} & {c.astype(np.float32).tobytes() for c in plain}),
    }


def report(figures: dict[str, Any]) -> None:
    """One line a side, then the ratio."""
    for name in ("peer", "lemon"):
        f = figures[name]
        print(
            f"{name:<6} {f['wall_s']:6.2f} s/tile wall, {f['cpu_s']:6.2f} s CPU: network {f['network_cpu_s']:.2f}, "
            f"post-processing {f['postprocessing_cpu_s']:.3f}; {f['page_faults']:,.0f} page faults"
        )
    for clock in ("wall_s", "cpu_s"):
        r = figures[f"ratio_{clock}"]
        print(f"ratio by {clock[:-2]:<4} {r['median']:.2f} (rounds {r['min']:.2f} to {r['max']:.2f})")
    print(
        f"{figures['gflop_a_tile']:.0f} GFLOP a tile in the plain form; logits differ by at most "
        f"{figures['largest_difference_logits']:.1e}, maps by {figures['largest_difference_maps']:.1e}; "
        f"{figures['polygons_equal']} of {figures['nuclei_peer']} polygons are equal"
    )


def plain_postprocessing(mask: np.ndarray, hv_maps: np.ndarray, *, min_area_px: float) -> list[np.ndarray]:
    """The post-processing as it is described (see ``lemon.nuclei.instances``), step by step over the whole image.

    Takes bool [H, W] and float [2, H, W]; gives contours int32 [N, 2], unrepaired.
    """

    def stretched(image: np.ndarray) -> np.ndarray:
        return cv2.normalize(image, None, 0, 1, cv2.NORM_MINMAX, cv2.CV_32F)  # type: ignore[call-overload]

    horizontal, vertical = (stretched(m.astype(np.float32)) for m in hv_maps)
    horizontal = 1 - stretched(cv2.Sobel(horizontal, cv2.CV_64F, 1, 0, ksize=5))
    vertical = 1 - stretched(cv2.Sobel(vertical, cv2.CV_64F, 0, 1, ksize=5))
    ellipse = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, ellipse, iterations=2)
    edges = np.maximum(np.sqrt(horizontal**2 + vertical**2) - (1.0 - opened), 0)
    relief = -cv2.GaussianBlur((1 - edges) * opened, (3, 3), 0)
    away = np.maximum(opened.astype(np.int32) - (edges >= 0.4), 0)
    markers, _ = ndimage.label(ndimage.binary_fill_holes(away))
    contours: list[np.ndarray] = []
    for piece in regionprops(ndimage.label(mask)[0]):
        if piece.area < min_area_px:
            continue
        own = markers[piece.slice] * piece.image
        ids = np.unique(own)[np.unique(own) > 0]
        cells = [piece.image]
        if len(ids) > 1:
            labels = watershed(relief[piece.slice], markers=own, mask=opened[piece.slice])
            cells = [labels == i for i in ids]
        y_px, x_px = piece.bbox[:2]
        for cell in cells:
            found = cv2.findContours(
                cell.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x_px, y_px)
            )[0]
            for contour in found[:1]:
                simple = cv2.approxPolyDP(contour, 0.006 * cv2.arcLength(contour, True), True)
                if cv2.contourArea(simple) > min_area_px:
                    contours.append(simple[:, 0])
    return contours


if __name__ == "__main__":
    main()
