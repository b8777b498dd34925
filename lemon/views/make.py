"""Pairs of views of cells, made in batches on the images' device with parameters drawn for each sample.

Order of the operations (the paper's trainer): stain, colour jitter, grayscale, RotationCrop (60 -> 40 px),
RandomResizedCrop and flip, blur, solarisation, erasing to black, normalisation.

Rotation, resized crop and flip are one resampling, done before the colours; lemon/views/render.py says what that
changes, and ``reference=True`` gives the order above with torchvision's two resamplings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lemon.schema import CELL_PX, VIEW_PX
from lemon.views.draws import ViewParameters, draw_view_parameters
from lemon.views.images import check_images
from lemon.views.macenko import draw_perturbations, perturb_stains
from lemon.views.policy import Policy, Stain, ViewRecipe, load_policy, policy_names
from lemon.views.render import CPU_CHUNK, constants_of, plan_of, render_batch, render_views
from lemon.views.stain import StainDraw, StainStatistics, draw_templates, recolor

__all__ = [
    "Policy",
    "ViewParameters",
    "constants_of",
    "draw_view_parameters",
    "load_policy",
    "make_local_views",
    "make_views",
    "plan_of",
    "policy_names",
    "render_views",
    "statistics_of",
]


def make_views(
    images_u8: torch.Tensor,
    *,
    policy: Policy,
    generator: torch.Generator,
    reference: bool = False,
    compiled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two views of every cell.

    Args:
        images_u8: [B, 60, 60, 3] uint8 RGB at 0.25 um/px, on any device; any strides.
        policy: what is done (``load_policy``).
        generator: source of all randomness, on the images' device; the same seed gives the same views.
        reference: torchvision's order of operations and two resamplings, for comparisons; slower.
        compiled: render with torch.compile (static shapes: keep B constant).

    Returns:
        view A and view B, each [B, 3, 40, 40] float32, normalised, on the images' device.

    Raises:
        ValueError: for images of another shape or type, a generator on another device, or a stain policy whose
            statistics are missing.
    """
    _check(images_u8, generator)
    count, device, recipes = len(images_u8), images_u8.device, policy.recipes
    # Stains are drawn last, so policies that differ in stain alone make otherwise equal views from the same seed.
    drawn = [
        draw_view_parameters(recipe, count=count, size_px=VIEW_PX, generator=generator, device=device)
        for recipe in recipes
    ]
    cells = _stained(images_u8, stain=policy.stain, generator=generator, times=2)
    view_a, view_b = (
        _render(
            source, parameters, recipe=recipe, policy=policy, size_px=VIEW_PX, reference=reference, compiled=compiled
        )
        for source, parameters, recipe in zip(cells, drawn, recipes, strict=True)
    )
    return view_a, view_b


def make_local_views(
    images_u8: torch.Tensor,
    *,
    policy: Policy,
    generator: torch.Generator,
    count: int,
    size_px: int = 24,
    reference: bool = False,
    compiled: bool = False,
) -> torch.Tensor:
    """DINOv2's local crops: ``count`` small views of every cell, by view A's recipe with ``policy.local``'s crop.

    Args:
        images_u8, policy, generator, reference, compiled: as for ``make_views``.
        count: crops of a cell.
        size_px: side s of a crop, a multiple of the encoder's patch (8 px).

    Returns:
        [count * B, 3, s, s] float32; crop k of cell i is row k * B + i: ``unflatten(0, (count, B))`` has crops first.

    Raises:
        ValueError: as ``make_views``, and for a size that is not a multiple of 8 or a count below 1.
    """
    _check(images_u8, generator)
    if size_px < 8 or size_px % 8:
        raise ValueError(f"size_px: got {size_px}; expected a multiple of the patch, 8 px")
    if count < 1:
        raise ValueError(f"count: got {count}; expected at least 1 local crop")
    recipe, rows, device = policy.local_recipe, count * len(images_u8), images_u8.device
    parameters = draw_view_parameters(recipe, count=rows, size_px=size_px, generator=generator, device=device)
    cells = torch.cat(_stained(images_u8, stain=policy.stain, generator=generator, times=count))
    return _render(
        cells, parameters, recipe=recipe, policy=policy, size_px=size_px, reference=reference, compiled=compiled
    )


def _render(
    images_u8: torch.Tensor,
    parameters: ViewParameters,
    *,
    recipe: ViewRecipe,
    policy: Policy,
    size_px: int,
    reference: bool,
    compiled: bool,
) -> torch.Tensor:
    plan = plan_of(recipe, size_px=size_px, reference=reference)
    constants = constants_of(policy, kernel_px=recipe.blur.kernel_px, size_px=size_px, device=images_u8.device)
    return render_batch(images_u8, parameters, plan=plan, constants=constants, compiled=compiled)


def _check(images_u8: torch.Tensor, generator: torch.Generator) -> None:
    check_images(images_u8, side_px=CELL_PX)
    source, device = generator.device, images_u8.device
    if source.type != device.type or (source.index is not None and source.index != device.index):
        on = f"generator: got one on {source} for images on {device}"
        raise ValueError(f"{on}; expected torch.Generator(device=images.device)")


def _stained(images_u8: torch.Tensor, *, stain: Stain, generator: torch.Generator, times: int) -> list[torch.Tensor]:
    """``times`` versions of the cells with stains drawn for each; what depends on the cell alone is computed once."""
    count, device = images_u8.shape[0], images_u8.device
    if stain.kind == "none":
        return [images_u8] * times
    if stain.kind == "macenko":
        ranges: dict[str, Any] = {"p": stain.p, "scale": stain.alpha, "shift": stain.beta}
        draws = [draw_perturbations(count=count, generator=generator, device=device, **ranges) for _ in range(times)]
        return _in_chunks(perturb_stains, images_u8, draws)
    statistics = statistics_of(stain)
    draws = [
        draw_templates(statistics, count=count, p=stain.p, generator=generator, device=device) for _ in range(times)
    ]
    return _in_chunks(lambda images, chosen: recolor(images, chosen, space=stain.space), images_u8, draws)


def statistics_of(stain: Stain) -> StainStatistics:
    """The mixture that a policy draws from. Raises ValueError for a file that is absent, damaged or another one."""
    remedy = f"`lemon fit-stain cells=... space={stain.space} components={stain.components}`"
    if stain.statistics is None:
        raise ValueError(f"stain.statistics: missing for kind=gmm; fit them with {remedy} and give the file's path")
    statistics = _load_statistics(stain.statistics)
    if (statistics.space, statistics.components) != (stain.space, stain.components):
        got = f"space={statistics.space} components={statistics.components}"
        raise ValueError(f"stain.statistics: {stain.statistics} holds {got}; expected those of {remedy}")
    return statistics


@lru_cache(maxsize=16)
def _read_statistics(path: str, _modified_ns: int) -> StainStatistics:
    return StainStatistics.load(path)


def _load_statistics(path: str) -> StainStatistics:
    """The file's content, read again only when the file has changed (an object on S3: once a process)."""
    file = Path(path)
    return _read_statistics(path, file.stat().st_mtime_ns if file.is_file() else 0)


def _in_chunks(
    operation: Callable[[torch.Tensor, Sequence[StainDraw]], list[torch.Tensor]],
    images_u8: torch.Tensor,
    draws: Sequence[StainDraw],
) -> list[torch.Tensor]:
    """``operation(images, draws)``, on a CPU in chunks that fit its cache."""
    if images_u8.device.type != "cpu" or len(images_u8) <= CPU_CHUNK:
        return operation(images_u8, draws)
    parts = []
    for start in range(0, len(images_u8), CPU_CHUNK):
        rows = slice(start, start + CPU_CHUNK)
        parts.append(operation(images_u8[rows], [StainDraw(*(field[rows] for field in draw)) for draw in draws]))
    return [torch.cat(version) for version in zip(*parts, strict=True)]
