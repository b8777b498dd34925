"""HoverFast's network on one CPU by several engines: time, and how far the nuclei are those of the plain network.

    python -m benchmarks.hoverfast_engines [--tile IMAGE] [--side 1024] [--rounds 5] [--threads 1] [--data FOLDER ...]

The engines: the network as it is loaded (``plain``); what ``segmenter=hoverfast`` runs in fp32, strips and Toom-Cook
(``rows``, ``lemon.nuclei.hoverfast_cpu``); batch norm folded and channels last in fp32 and in bfloat16 (``folded``,
``bf16``); ONNX Runtime and OpenVINO on the folded network, where the packages are installed. All have LEMON's weights
and the same number of threads, and take turns in one process; figures are medians over rounds, by CPU time of the
process (the fairer on a machine with other work) and by wall clock.

``--data`` names folders of labelled images, as ``benchmarks.segmentation`` reads them: the nuclei that ``rows`` and
``bf16`` find in the middle 512 px of held-out images are compared with those of ``plain`` and drawn ones by F1
within 3 um.
"""

from __future__ import annotations

import argparse
import importlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.hoverfast import SHARED, read_tile
from benchmarks.record import record
from lemon.nuclei.hoverfast import HoverFastNet, fold_batch_norm, load_checkpoint, optimise
from lemon.nuclei.hoverfast_device import hv_gradients, probability_of
from lemon.nuclei.levels import MIN_AREA_UM2, find_nuclei_by_level
from lemon.nuclei.released import weights_path
from lemon.nuclei.scores import centroids, detection
from lemon.nuclei.training.check import middles
from lemon.nuclei.training.images import Labelled, split
from lemon.nuclei.training.layouts import read_folder

HELD_OUT_SHARE = 0.08  # of the images that LEMON's weights never saw
Engine = Callable[[np.ndarray], tuple[Tensor, Tensor]]
"""uint8 [H, W, 3] -> logits and maps, float [1, 2, H, W]."""


# --- engines ----------------------------------------------------------------------------------------------------------


def torch_engine(net: torch.nn.Module, dtype: torch.dtype) -> Engine:
    """A network of PyTorch in a precision."""

    @torch.inference_mode()
    def run(tile: np.ndarray) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(tile)[None].permute(0, 3, 1, 2).to(dtype).div_(255)
        logits, maps = net(pixels)
        return logits, maps

    return run


def exported(net: HoverFastNet, side: int) -> bytes:
    """The folded network as ONNX, for tiles of one size."""
    stream = io.BytesIO()
    example = torch.zeros(1, 3, side, side)
    torch.onnx.export(fold_batch_norm(net), (example,), stream, input_names=["pixels"], dynamo=False)
    return stream.getvalue()


def onnx_engine(model: bytes, threads: int) -> Engine:
    """ONNX Runtime. Raises ModuleNotFoundError."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(tile: np.ndarray) -> tuple[Tensor, Tensor]:
        logits, maps = session.run(None, {"pixels": _scaled(tile)})
        return torch.from_numpy(logits), torch.from_numpy(maps)

    return run


def openvino_engine(model: bytes, threads: int) -> Engine:
    """OpenVINO in fp32. Raises ModuleNotFoundError."""
    openvino: Any = importlib.import_module("openvino")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "net.onnx").write_bytes(model)
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(Path(folder) / "net.onnx"), "CPU", settings)

    def run(tile: np.ndarray) -> tuple[Tensor, Tensor]:
        results = compiled(_scaled(tile))
        logits, maps = (torch.from_numpy(results[i].copy()) for i in range(2))
        return logits, maps

    return run


def _scaled(tile: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(tile.transpose(2, 0, 1)[None].astype(np.float32) / 255)


def engines(*, side: int, threads: int) -> dict[str, Engine]:
    """All that can run here, by name; what is not installed is told."""
    net = load_checkpoint(weights_path(None))
    fp32, bf16 = torch.float32, torch.bfloat16
    folded = fold_batch_norm(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = {
        "plain": torch_engine(net, fp32),
        "rows": torch_engine(optimise(net, device="cpu", dtype=fp32), fp32),
        "folded": torch_engine(folded, fp32),
        "bf16": torch_engine(optimise(net, device="cpu", dtype=bf16), bf16),
    }
    model = exported(net, side)
    for name, make in (("onnxruntime", onnx_engine), ("openvino", openvino_engine)):
        try:
            found[name] = make(model, threads)
        except ModuleNotFoundError:
            print(f"{name} is not installed")
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def times(found: Mapping[str, Engine], tile: np.ndarray, *, rounds: int) -> dict[str, dict[str, float]]:
    """Medians of seconds a tile, and of the ratio to ``rows`` within rounds."""
    for run in found.values():
        run(tile)
    each: list[dict[str, tuple[float, float]]] = []
    for _ in range(rounds):
        one = {}
        for name, run in found.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run(tile)
            one[name] = (time.process_time() - cpu, time.perf_counter() - wall)
        each.append(one)
    figures = {}
    for name in found:
        ratios = [one[name][0] / one["rows"][0] for one in each]
        figures[name] = {
            "cpu_s": round(statistics.median(one[name][0] for one in each), 3),
            "wall_s": round(statistics.median(one[name][1] for one in each), 3),
            "cpu_to_rows": round(statistics.median(ratios), 3),
            "cpu_to_rows_min": round(min(ratios), 3),
            "cpu_to_rows_max": round(max(ratios), 3),
        }
    return figures


def found_by(run: Engine, image: np.ndarray) -> np.ndarray:
    """Centroids [N, 2] of the nuclei of an image uint8 [H, W, 3]."""
    logits, maps = run(image)
    nuclei = find_nuclei_by_level(
        probability_of(logits)[0].numpy(), hv_gradients(maps)[0].numpy(), min_area_px=16 * MIN_AREA_UM2["level"]
    )
    return np.array([nucleus.centroid_px for nucleus in nuclei], float).reshape(-1, 2)


def agreement(found: Mapping[str, Engine], images: list[Labelled]) -> dict[str, dict[str, float]]:
    """Mean F1 over images of each engine's nuclei against those of ``plain``, and against drawn ones."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for image in images:
        expected = found_by(found["plain"], image.image)
        for name, run in found.items():
            own = expected if name == "plain" else found_by(run, image.image)
            drawn = detection(own, centroids(image.instances))["f1"]
            rows[name].append((detection(own, expected)["f1"], drawn))
    means = {name: np.mean(values, axis=0).round(4).tolist() for name, values in rows.items()}
    return {name: {"f1_to_plain": own, "f1_to_drawn": drawn} for name, (own, drawn) in means.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", default=str(SHARED / "data/tiles/hoverfast_tcga_tile.png"), help="an RGB image")
    parser.add_argument("--side", type=int, default=1024, help="px of the tile that are taken")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders of labelled images")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(options.threads)
    tile = np.ascontiguousarray(read_tile(options.tile)[: options.side, : options.side])
    figures: dict[str, Any] = {
        "times": times(found := engines(side=options.side, threads=options.threads), tile, rounds=options.rounds)
    }
    for name, row in figures["times"].items():
        print(f"{name:<12} {row['cpu_s']:6.2f} s CPU, {row['wall_s']:6.2f} s wall, {row['cpu_to_rows']:.2f} of rows")
    held_out = split([i for folder in options.data for i in read_folder(folder)], held_out_share=HELD_OUT_SHARE)[1]
    if held_out:
        in_torch = {name: run for name, run in found.items() if name in ("plain", "rows", "bf16")}  # of any size
        figures["nuclei"] = agreement(in_torch, middles(held_out, side_px=512))
        figures["images"] = len(held_out)
        for name, row in figures["nuclei"].items():
            print(f"{name:<12} F1 {row['f1_to_plain']:.4f} to plain, {row['f1_to_drawn']:.4f} to drawn nuclei")
    circumstances = {"side_px": options.side, "threads": options.threads, "rounds": options.rounds}
    record("hoverfast_engines", circumstances | figures, packages=("torch", "numpy"))


if __name__ == "__main__":
    main()
