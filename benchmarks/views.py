"""Views a second on one CPU core against torchvision's PIL pipeline of the same policy, or on a GPU.

python -m benchmarks.views [--policy a1_gray] [--batch 256] [--rounds 7] [--cells FOLDER]
python -m benchmarks.views --device cuda --batch 4096 [--compile]

Both sides make the same number of views of the same cells, in turns within one process on one thread. Views a second
are given by wall clock and by CPU time of the process; on a machine with other work the latter is the fairer.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T

from benchmarks.encoding import real_crops, synthetic_crops
from benchmarks.record import hardware, record
from lemon.views.make import (
    constants_of,
    draw_view_parameters,
    load_policy,
    make_views,
    plan_of,
    render_views,
)
from lemon.views.policy import Policy, ViewRecipe


def main() -> None:
    """Measure, print a table and append a JSON line to benchmarks/results/views.jsonl."""
    options = arguments()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    device, policy = torch.device(options.device), load_policy(options.policy)
    cells = real_crops(options.cells, options.batch) if options.cells else synthetic_crops(options.batch)
    sides = {"lemon": batched(cells, policy=policy, device=device, repeats=options.repeats, compiled=options.compile)}
    if policy.stain.kind == "none":
        peer_cells = cells[: options.peer_cells]
        sides["torchvision PIL"] = pil(peer_cells, policy=policy, pillow_blur=False)
        sides["torchvision PIL, Pillow's blur"] = pil(peer_cells, policy=policy, pillow_blur=True)
    figures = measure(sides, rounds=options.rounds, by_cpu=device.type == "cpu")
    circumstances = {name: getattr(options, name) for name in ("policy", "device", "batch", "compile")}
    if device.type == "cuda":
        circumstances["gpu"] = torch.cuda.get_device_name(device)
    difference = fused_difference(cells[:256], policy=policy)
    source = "cells" if options.cells else "synthetic"
    record(
        "views",
        circumstances | {"source": source, "fused_minus_reference_grey_levels": difference, "sides": figures},
        packages=("torch", "torchvision", "pillow", "numpy"),
    )
    print(f"fused against reference: {difference} grey levels on average")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="a1_gray", help="a policy of conf/presets/views that needs no statistics")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256, help="cells a call of make_views")
    parser.add_argument("--repeats", type=int, default=4, help="calls of make_views a round")
    parser.add_argument("--peer-cells", type=int, default=256, help="cells a round of the PIL pipeline, two views each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="render with torch.compile")
    parser.add_argument("--cells", help="folder of a cells table (default: windows of a synthetic slide)")
    return parser.parse_args()


def batched(
    cells: np.ndarray, *, policy: Policy, device: torch.device, repeats: int, compiled: bool
) -> Callable[[], int]:
    """A round of make_views; returns how many views it made."""
    images = torch.from_numpy(np.ascontiguousarray(cells)).to(device)
    generator = torch.Generator(device=device).manual_seed(0)

    def one_round() -> int:
        for _ in range(repeats):
            make_views(images, policy=policy, generator=generator, compiled=compiled)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 2 * len(images) * repeats

    return one_round


def pil(cells: np.ndarray, *, policy: Policy, pillow_blur: bool) -> Callable[[], int]:
    """A round of torchvision's transforms on PIL images, two views a cell, in the paper's order."""
    pipelines = [
        T.Compose([*pil_steps(recipe, pillow_blur=pillow_blur), T.Normalize(policy.mean, policy.std)])
        for recipe in policy.recipes
    ]

    def one_round() -> int:
        for cell in cells:
            image = Image.fromarray(cell)
            for pipeline in pipelines:
                pipeline(image)
        return 2 * len(cells)

    return one_round


def pil_steps(recipe: ViewRecipe, *, pillow_blur: bool) -> list[Any]:
    """torchvision's transforms for a recipe; the blur by torchvision (as ours) or by Pillow's ImageFilter (MoCo's)."""
    jitter, blur, erasing = recipe.jitter, recipe.blur, recipe.erasing
    colour = T.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    soften = PillowBlur(blur.sigma) if pillow_blur else T.GaussianBlur(blur.kernel_px, blur.sigma)
    turn = T.RandomRotation((0, recipe.rotation_degrees), interpolation=T.InterpolationMode.BILINEAR)
    steps = [
        (jitter.p, T.RandomApply([colour], p=jitter.p)),
        (recipe.grayscale_p, T.RandomGrayscale(recipe.grayscale_p)),
        (recipe.rotation_degrees, turn),
        (1, T.CenterCrop(40)),
        (1, T.RandomResizedCrop(40, recipe.crop.scale, recipe.crop.ratio)),
        (recipe.flip_p, T.RandomHorizontalFlip(recipe.flip_p)),
        (blur.p, T.RandomApply([soften], p=blur.p)),
        (recipe.solarize.p, T.RandomSolarize(128, p=recipe.solarize.p)),
        (1, T.ToTensor()),
        (erasing.p, T.RandomErasing(erasing.p, erasing.scale, erasing.ratio, value=0)),
    ]
    return [step for occurs, step in steps if occurs]


class PillowBlur:
    """MoCo's Gaussian blur: Pillow's ImageFilter with a random radius."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Blur one image."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


def measure(sides: dict[str, Callable[[], int]], *, rounds: int, by_cpu: bool) -> dict[str, dict[str, float]]:
    """Medians over rounds in which the sides take turns; ratios are of lemon to each side, round by round."""
    for side in sides.values():
        side()  # warm up: memory, compilation, imports
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            views = side()
            cpu[name].append(views / (time.process_time() - cpu_start))
            wall[name].append(views / (time.perf_counter() - wall_start))
    figures = {}
    clock = cpu if by_cpu else wall
    print(f"{'':32} {'views/s':>10} {'views/CPU s':>12} {'lemon is':>10}    on {hardware()}")
    for name in sides:
        ratios = [ours / theirs for ours, theirs in zip(clock["lemon"], clock[name], strict=True)]
        figures[name] = {
            "views_per_s": round(statistics.median(wall[name]), 1),
            "views_per_cpu_s": round(statistics.median(cpu[name]), 1),
            "lemon_ratio": round(statistics.median(ratios), 2),
            "lemon_ratio_lowest": round(min(ratios), 2),
        }
        seconds, cpu_seconds, ratio, _ = figures[name].values()
        print(f"{name:32} {seconds:>10,.0f} {cpu_seconds:>12,.0f} {ratio:>9.1f}x")
    return figures


def fused_difference(cells: np.ndarray, *, policy: Policy) -> float:
    """Mean absolute difference of the fused views from those of ``reference=True``, in grey levels."""
    images, cpu = torch.from_numpy(np.ascontiguousarray(cells)), torch.device("cpu")
    std, recipe = torch.tensor(policy.std).view(3, 1, 1) * 255, policy.view_a
    generator = torch.Generator().manual_seed(0)
    parameters = draw_view_parameters(recipe, count=len(images), size_px=40, generator=generator, device=cpu)
    constants = constants_of(policy, kernel_px=recipe.blur.kernel_px, size_px=40, device=cpu)
    fused, reference = (
        render_views(images, parameters, plan=plan_of(recipe, size_px=40, reference=path), constants=constants)
        for path in (False, True)
    )
    return round(((fused - reference) * std).abs().mean().item(), 3)


if __name__ == "__main__":
    main()
