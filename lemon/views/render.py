"""Rendering of views with given parameters: tensors in, tensors out, no randomness.

DEVIATION: by default rotation, resized crop and flip are one resampling, done before the colours, on 40x40 instead of
60x60 pixels. Colours are per-pixel operations, so only three things change: one bilinear interpolation instead of two
(sharper views), interpolation before instead of after the clipping to [0, 1], and the mean grey of contrast, which is
taken from a lattice of 144 points of the whole cell instead of its 3,600 pixels. ``reference=True`` keeps the order and
resamples twice; ``benchmarks/views.py`` measures what that changes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from lemon.runtime.compiling import compile_kept
from lemon.schema import CELL_PX
from lemon.views.color import blur_basis, erase_, gaussian_blur_, grayscale_, jitter_, solarize_
from lemon.views.draws import ViewParameters
from lemon.views.geometry import lattice, resized_crop, rotate_crop, sample_views
from lemon.views.policy import Policy, ViewRecipe

LATTICE = 12
"""Points along a side of the lattice that stands for the whole cell in contrast."""
CPU_CHUNK = 128
"""Samples rendered at a time on a CPU: 2.7 MB a tensor. Fewer pay more for dispatch, more fall out of the cache."""


class Plan(NamedTuple):
    """What is fixed for a whole batch: sizes, and which operations occur at all."""

    size_px: int
    reference: bool
    jitter: bool
    grayscale: bool
    blur: bool
    solarize: bool
    erase: bool


class Constants(NamedTuple):
    """Tensors that depend on the policy only; kept on the device between batches."""

    scale: torch.Tensor  # [3, 1, 1] 1 / std
    offset: torch.Tensor  # [3, 1, 1] - mean / std
    blur: torch.Tensor  # see blur_basis
    lattice: torch.Tensor  # [2, LATTICE**2]


def plan_of(recipe: ViewRecipe, *, size_px: int, reference: bool = False) -> Plan:
    """The plan of a recipe: an operation of probability 0 is left out."""
    return Plan(
        size_px=size_px,
        reference=reference,
        jitter=recipe.jitter.p > 0,
        grayscale=recipe.grayscale_p > 0,
        blur=recipe.blur.p > 0,
        solarize=recipe.solarize.p > 0,
        erase=recipe.erasing.p > 0,
    )


@lru_cache(maxsize=32)
def constants_of(policy: Policy, *, kernel_px: int, size_px: int, device: torch.device) -> Constants:
    """The constants of a policy on a device, made once."""
    mean, std = torch.tensor(policy.mean), torch.tensor(policy.std)
    scale, offset = (1 / std)[:, None, None], (-mean / std)[:, None, None]
    tensors = (scale, offset, blur_basis(kernel_px=kernel_px, side_px=size_px), lattice(LATTICE))
    if device.type == "cuda":  # from pageable memory a copy makes the host wait for all that the device has to do
        return Constants(*(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors))
    return Constants(*(tensor.to(device) for tensor in tensors))


def render_views(
    images_u8: torch.Tensor, parameters: ViewParameters, *, plan: Plan, constants: Constants
) -> torch.Tensor:
    """One view of every cell with given parameters: a function of tensors, which torch.compile takes whole.

    Args:
        images_u8: [B, 60, 60, 3] uint8.
        parameters: one set a sample (``draw_view_parameters``).
        plan: which operations there are (``plan_of``).
        constants: ``constants_of`` the policy.

    Returns:
        [B, 3, s, s] float32, normalised.
    """
    p, side = parameters, plan.size_px
    cells = images_u8.permute(0, 3, 1, 2).float()  # [B, 3, 60, 60], channels still innermost
    if plan.reference:
        pixels = _colours_(cells.flatten(2).mul(1 / 255), p, plan=plan)
        rotated = rotate_crop(pixels.unflatten(2, (CELL_PX, CELL_PX)), angle=p.angle)
        views = resized_crop(rotated, crop=p.crop, size_px=side)
        views = torch.where(p.flip[:, None, None, None], views.flip(3), views)
    else:
        extra = constants.lattice if plan.jitter else None
        pixels = sample_views(cells, angle=p.angle, crop=p.crop, flip=p.flip, size_px=side, extra=extra).mul_(1 / 255)
        pixels = _colours_(pixels, p, plan=plan, reference=slice(side * side, None))
        views = pixels[:, :, : side * side].unflatten(2, (side, side))
    if plan.blur:
        views = gaussian_blur_(views, sigma=p.blur_sigma, basis=constants.blur)
    if plan.solarize:
        views = solarize_(views, threshold=p.solarize_from)
    if plan.erase:
        views = erase_(views, box=p.erase)
    return (views * constants.scale).add_(constants.offset)


def _colours_(pixels: torch.Tensor, p: ViewParameters, *, plan: Plan, reference: slice = slice(None)) -> torch.Tensor:
    if plan.jitter:
        pixels = jitter_(
            pixels,
            order=p.order,
            brightness=p.brightness,
            contrast=p.contrast,
            saturation=p.saturation,
            hue=p.hue,
            reference=reference,
        )
    return grayscale_(pixels, p.grayscale) if plan.grayscale else pixels


@lru_cache(maxsize=1)
def _compiled_render() -> Any:
    return compile_kept(render_views, dynamic=False)


def render_batch(
    images_u8: torch.Tensor, parameters: ViewParameters, *, plan: Plan, constants: Constants, compiled: bool
) -> torch.Tensor:
    """``render_views``, compiled if asked for, and on a CPU in chunks that fit its cache."""
    count = images_u8.shape[0]
    if compiled:
        views: torch.Tensor = _compiled_render()(images_u8, parameters, plan=plan, constants=constants)
        return views
    if images_u8.device.type != "cpu" or count <= CPU_CHUNK:
        return render_views(images_u8, parameters, plan=plan, constants=constants)
    out = torch.empty(count, 3, plan.size_px, plan.size_px)
    for start in range(0, count, CPU_CHUNK):
        stop = min(start + CPU_CHUNK, count)
        chunk = parameters.rows(start, stop)
        out[start:stop] = render_views(images_u8[start:stop], chunk, plan=plan, constants=constants)
    return out
