"""The pretraining step: images a second of the whole step, its share of the device's peak, and of the feed alone.

python -m benchmarks.pretrain [--device cuda --batch 4096 --encoder vit_s8 --peak-tflops 989] [--steps 20]
    [--method mocov3|dinov2|dinov2_kde] [--parts step feed peer lightly] [--profile TABLE.txt]

Rates on the same cells, the same method and the same device, one after another in one process; each is printed
and recorded as it comes:

- step: the trainer as ``jobs/pretrain.py`` runs it (feed, views on the device, forward, backward, optimiser);
- feed: the same feed with the step replaced by nothing;
- peer: the same method fed by a torchvision PIL pipeline of the same policy in a DataLoader, as many workers as cores
  (MoCo v3 only);
- lightly: that DataLoader before a MoCo v3 of lightly's heads, momentum and loss (pip install lightly) around timm's
  network of the same size, put together as its examples for MoCo v2 and BYOL are; it has none for MoCo v3. Its loss
  has negatives among queries too, a small part of the step. Left out where it is not installed.

MFU is the arithmetic of a step (9.3 GFLOP an image for ViT-S/8 with its heads, counted here by torch) over the peak.
The count is that of the whole network; where the last block computes class tokens alone, less is done.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize

from benchmarks.encoding import synthetic_crops
from benchmarks.record import record
from benchmarks.views import pil_steps
from lemon.cells.batches import Feed
from lemon.cells.images import ImagesInMemory
from lemon.cells.order import Permutation
from lemon.encoders import config as encoders
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.config import DINOv2Config, MoCoV3Config
from lemon.pretrain.dinov2 import DINOv2
from lemon.pretrain.loop import Trainer
from lemon.pretrain.mocov3 import MoCoV3
from lemon.pretrain.schedules import Method
from lemon.runtime.store import Store
from lemon.views.policy import load_policy

WARMUP_STEPS = 3
PARTS = ["step", "feed", "peer", "lightly"]
METHODS: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "mocov3": (MoCoV3, {}),
    "dinov2": (DINOv2, {}),
    "dinov2_kde": (DINOv2, {"local_to_global": False, "regulariser": "kde"}),
}


def main() -> None:
    """Measure, print and record."""
    options = arguments()
    images = synthetic_crops(options.cells)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"

    def tell(figures: dict[str, float]) -> None:
        for name, value in figures.items():
            print(f"{name:>22} {value:,.3f}", flush=True)
        packages = ("torch", "torchvision", "timm")
        record("pretrain", {**vars(options), "device_name": device, **figures}, packages=packages)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, images, Path(folder))
        if "step" in options.parts:
            tell(step_figures(trainer, options))
        if options.profile:
            profile(trainer, options)
        if "feed" in options.parts:
            tell({"feed_images_per_s": feed_rate(images, options)})
        if "peer" in options.parts:
            tell({"peer_images_per_s": peer_rate(trainer, images, options)})
        if "lightly" in options.parts and importlib.util.find_spec("lightly"):
            tell({"lightly_images_per_s": lightly_rate(images, options)})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="vit_tiny8", choices=["vit_tiny8", "vit_s8", "vit_b8"])
    parser.add_argument("--method", default="mocov3", choices=list(METHODS))
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--policy", default="a1_gray")
    parser.add_argument("--chunk", type=int, help="crops whose activations are kept at a time (ssl.chunk)")
    parser.add_argument("--peak-tflops", type=float, help="of the device, bf16, dense: gives the MFU")
    parser.add_argument("--profile", help="file for a table of three steps' kernels, by time on the device")
    return parser.parse_args()


def build(options: argparse.Namespace, images: np.ndarray, folder: Path) -> Trainer:
    """A trainer with the paper's heads."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    method = method_of(options, chunk=options.chunk).to(device)
    order = Permutation(len(images), seed=0)
    return Trainer(
        method=method,
        feed=Feed(ImagesInMemory(images), order, batch=options.batch, device=device, resident=cuda),
        policy=load_policy(options.policy),
        schedules=method.schedules(epochs=1000, steps_per_epoch=100, batch=options.batch),
        seed=0,
        checkpoints=Checkpoints(Store(folder)),
        config={},
        bf16=cuda,
        compiled=cuda,
    )


def method_of(options: argparse.Namespace, *, chunk: int | None = None) -> Method:
    """The method that is measured, with its settings of a run."""
    kind, settings = METHODS[options.method]
    config = (MoCoV3Config if kind is MoCoV3 else DINOv2Config)(warmup_epochs=1, chunk=chunk, **settings)
    return kind(config, getattr(encoders, options.encoder.upper()), seed=0)


def count_gflop(options: argparse.Namespace) -> float:
    """GFLOP of one training step an image, counted by torch on a small batch (a multiply-add is two)."""
    method = method_of(options)
    values = method.schedules(epochs=10, steps_per_epoch=10, batch=4).at(1)
    views = [torch.randn(4, 3, 40, 40)] * 2
    if method.n_local_views:
        size = method.config.local_crop_px
        views.append(torch.randn(4 * method.n_local_views, 3, size, size))
    with FlopCounterMode(display=False) as counter:
        method(views, values=values)["loss"].backward()
    return counter.get_total_flops() / 4 / 1e9


def step_figures(trainer: Trainer, options: argparse.Namespace) -> dict[str, float]:
    """Images a second of whole steps, after three to warm up (compilation), and what follows from it."""
    cuda = options.device.startswith("cuda")
    batches = trainer.feed.batches(0, options.steps + WARMUP_STEPS)
    begun = time.perf_counter()
    for _ in range(WARMUP_STEPS):
        trainer.train_step(next(batches))
    synchronise(options)
    trainer.feed.wait_s, start = 0.0, time.perf_counter()
    for images in batches:
        trainer.train_step(images)
    synchronise(options)
    seconds = time.perf_counter() - start
    rate, gflop = options.steps * options.batch / seconds, count_gflop(options)
    figures = {
        "step_images_per_s": rate,
        "step_ms": 1e3 * seconds / options.steps,
        "first_steps_s": start - begun,
        "gflop_per_image": gflop,
        "data_wait_share": trainer.feed.wait_s / seconds,
    }
    if cuda:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if options.peak_tflops:
        figures["mfu"] = rate * gflop / 1e3 / options.peak_tflops
    return figures


def profile(trainer: Trainer, options: argparse.Namespace) -> None:
    """Write a table of the kernels of three steps, the dearest first."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device.startswith("cuda"):
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for images in trainer.feed.batches(trainer.step, trainer.step + 3):
            trainer.train_step(images)
        synchronise(options)
    time_of = "self_device_time_total" if options.device.startswith("cuda") else "self_cpu_time_total"
    rows = sorted(((getattr(e, time_of) / 3e3, e.count / 3, e.key) for e in profiler.key_averages()), reverse=True)
    lines = [f"{sum(ms for ms, *_ in rows):9.3f} ms a step of {options.batch} images, {options.method}", ""]
    lines += [f"{ms:9.3f} ms {calls:8.1f} calls  {key[:140]}" for ms, calls, key in rows[:100]]
    Path(options.profile).write_text("\n".join(lines) + "\n")


def feed_rate(images: np.ndarray, options: argparse.Namespace) -> float:
    """Images a second of the feed from host memory (the harder case) with nothing to do."""
    order, device = Permutation(len(images), seed=0), torch.device(options.device)
    feed = Feed(ImagesInMemory(images), order, batch=options.batch, device=device)
    batches = feed.batches(0, 202)
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch) for batch in batches)
    synchronise(options)
    return count / (time.perf_counter() - start)


class PilViews(Dataset):
    """Two views of a cell by torchvision's PIL pipeline."""

    def __init__(self, images: np.ndarray, policy: str) -> None:
        self._images = images
        chosen = load_policy(policy)
        steps = pil_steps(chosen.view_a, pillow_blur=False)
        self._pipeline = Compose([*steps, Normalize(chosen.mean, chosen.std)])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = Image.fromarray(self._images[index])
        return self._pipeline(image), self._pipeline(image)


def peer_rate(trainer: Trainer, images: np.ndarray, options: argparse.Namespace) -> float:
    """Images a second of the same method behind a DataLoader, without compilation of the views."""

    def step(views: list[torch.Tensor]) -> None:
        values = trainer.schedules.at(trainer.step)
        trainer.method.before_step(values)
        with trainer._autocast():
            parts = trainer.method(views, values=values)
        parts["loss"].backward()
        trainer._optimizer.step()
        trainer._optimizer.zero_grad(set_to_none=True)

    return rate_behind_loader(step, images, options)


def lightly_rate(images: np.ndarray, options: argparse.Namespace) -> float:
    """Images a second of MoCo v3 from lightly's parts behind the same DataLoader."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import heads
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    device, config, shape = torch.device(options.device), MoCoV3Config(), getattr(encoders, options.encoder.upper())
    hidden = {"hidden_dim": config.hidden_dim, "output_dim": config.out_dim}
    student = nn.Sequential(
        timm_vit(shape), heads.MoCoProjectionHead(shape.dim, **hidden, num_layers=3, batch_norm=True)
    ).to(device)
    predictor = heads.BYOLPredictionHead(config.out_dim, **hidden).to(device)
    teacher, criterion = copy.deepcopy(student), NTXentLoss(temperature=config.temperature)
    deactivate_requires_grad(teacher)
    optimizer = torch.optim.AdamW([*student.parameters(), *predictor.parameters()])

    def step(views: list[torch.Tensor]) -> None:
        update_momentum(student, teacher, m=0.99)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            queries = [predictor(student(view)) for view in views]
            with torch.no_grad():
                keys = [teacher(view) for view in views]
            loss = criterion(queries[0], keys[1]) + criterion(queries[1], keys[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return rate_behind_loader(step, images, options)


def timm_vit(shape: encoders.EncoderConfig) -> nn.Module:
    """timm's network of a shape, without a head."""
    return timm.models.VisionTransformer(
        img_size=shape.crop_px,
        patch_size=shape.patch_px,
        embed_dim=shape.dim,
        depth=shape.depth,
        num_heads=shape.heads,
        num_classes=0,
        global_pool="token",
    )


def rate_behind_loader(
    step: Callable[[list[torch.Tensor]], None], images: np.ndarray, options: argparse.Namespace
) -> float:
    """Images a second of a step behind torchvision's pipeline in a DataLoader."""
    loader = DataLoader(
        PilViews(images, options.policy),
        batch_size=options.batch,
        sampler=RandomSampler(images, replacement=True, num_samples=(options.steps + 1) * options.batch),
        num_workers=len(os.sched_getaffinity(0)),
        pin_memory=options.device.startswith("cuda"),
    )
    source = iter(loader)
    next(source)
    start = time.perf_counter()
    for _ in range(options.steps):
        step([view.to(options.device, non_blocking=True) for view in next(source)])
    synchronise(options)
    return options.steps * options.batch / (time.perf_counter() - start)


def synchronise(options: argparse.Namespace) -> None:
    """Wait for the device."""
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
