"""The pretraining step: images a second of the whole step, its share of the device's peak, and of the feed alone.

python -m benchmarks.pretrain [--device cuda --batch 4096 --encoder vit_s8 --peak-tflops 989] [--steps 20]

Three rates on the same cells, the same MoCo v3 and the same device, one after another in one process:

- step: the trainer as ``jobs/pretrain.py`` runs it (feed, views on the device, forward, backward, optimiser);
- feed: the same feed with the step replaced by nothing;
- peer: the same method fed by a torchvision PIL pipeline of the same policy in a DataLoader, as many workers as cores.

MFU is the arithmetic of a step (9.3 GFLOP an image for ViT-S/8 with its heads, counted here by torch) over the peak.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import Compose, Normalize

from benchmarks.encoding import synthetic_crops
from benchmarks.record import record
from benchmarks.views import pil_steps
from lemon.cells.batches import Feed, Order
from lemon.encoders import config as encoders
from lemon.pretrain.checkpoint import Checkpoints
from lemon.pretrain.config import MoCoV3Config
from lemon.pretrain.loop import Trainer
from lemon.pretrain.mocov3 import MoCoV3
from lemon.pretrain.policy import load_policy
from lemon.runtime.store import Store


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--encoder", default="vit_tiny8", choices=["vit_tiny8", "vit_s8", "vit_b8"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--policy", default="a1_gray")
    parser.add_argument("--chunk", type=int, help="crops whose activations are kept at a time (ssl.chunk)")
    parser.add_argument("--peak-tflops", type=float, help="of the device, bf16, dense: gives the MFU")
    options = parser.parse_args()
    images = synthetic_crops(options.cells)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(options, images, Path(folder))
        gflop = count_gflop(options)
        figures: dict[str, Any] = {"step_images_per_s": step_rate(trainer, options), "gflop_per_image": gflop}
        figures["data_wait_share"] = trainer.feed.wait_s / trainer_seconds(options, figures["step_images_per_s"])
    figures["feed_images_per_s"] = feed_rate(images, options)
    figures["peer_images_per_s"] = peer_rate(trainer, images, options)
    figures["feed_over_step"] = figures["feed_images_per_s"] / figures["step_images_per_s"]
    figures["step_over_peer"] = figures["step_images_per_s"] / figures["peer_images_per_s"]
    if options.peak_tflops:
        figures["mfu"] = figures["step_images_per_s"] * gflop / 1e3 / options.peak_tflops
    for name, value in figures.items():
        print(f"{name:>22} {value:,.3f}")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    record("pretrain", {**vars(options), "device_name": device, **figures}, packages=("torch", "torchvision", "timm"))


def build(options: argparse.Namespace, images: np.ndarray, folder: Path) -> Trainer:
    """A trainer of MoCo v3 with the paper's heads."""
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.set_float32_matmul_precision("high")
    sizes = getattr(encoders, options.encoder.upper())
    method = MoCoV3(MoCoV3Config(warmup_epochs=1, chunk=options.chunk), sizes, seed=0).to(device)
    order = Order(len(images), seed=0)
    return Trainer(
        method=method,
        feed=Feed(images, order, batch=options.batch, device=device, resident=cuda),
        policy=load_policy(options.policy),
        schedules=method.schedules(epochs=1000, steps_per_epoch=100, batch=options.batch),
        seed=0,
        checkpoints=Checkpoints(Store(folder)),
        config={},
        bf16=cuda,
        compiled=cuda,
    )


def count_gflop(options: argparse.Namespace) -> float:
    """GFLOP of one training step an image, counted by torch on a small batch (a multiply-add is two)."""
    sizes = getattr(encoders, options.encoder.upper())
    method = MoCoV3(MoCoV3Config(warmup_epochs=1), sizes, seed=0)
    values = method.schedules(epochs=10, steps_per_epoch=10, batch=4).at(1)
    with FlopCounterMode(display=False) as counter:
        method([torch.randn(4, 3, 40, 40)] * 2, values=values)["loss"].backward()
    return counter.get_total_flops() / 4 / 1e9


def step_rate(trainer: Trainer, options: argparse.Namespace) -> float:
    """Images a second of whole steps, after two to warm up (compilation)."""
    batches = trainer.feed.batches(0, options.steps + 2)
    for _ in range(2):
        trainer.train_step(next(batches))
    synchronise(options)
    trainer.feed.wait_s, start = 0.0, time.perf_counter()
    for images in batches:
        trainer.train_step(images)
    synchronise(options)
    return options.steps * options.batch / (time.perf_counter() - start)


def trainer_seconds(options: argparse.Namespace, rate: float) -> float:
    """Seconds that the measured steps took."""
    return options.steps * options.batch / rate


def feed_rate(images: np.ndarray, options: argparse.Namespace) -> float:
    """Images a second of the feed from host memory (the harder case) with nothing to do."""
    feed = Feed(images, Order(len(images), seed=0), batch=options.batch, device=torch.device(options.device))
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
    loader = DataLoader(
        PilViews(images, options.policy),
        batch_size=options.batch,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        pin_memory=options.device.startswith("cuda"),
    )
    source = iter(loader)
    next(source)
    start = time.perf_counter()
    for _ in range(options.steps):
        views = [view.to(options.device, non_blocking=True) for view in next(source)]
        values = trainer.schedules.at(trainer.step)
        trainer.method.before_step(values)
        with trainer._autocast():
            parts = trainer.method(views, values=values)
        parts["loss"].backward()
        trainer._optimizer.step()
        trainer._optimizer.zero_grad(set_to_none=True)
    synchronise(options)
    return options.steps * options.batch / (time.perf_counter() - start)


def synchronise(options: argparse.Namespace) -> None:
    """Wait for the device."""
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
