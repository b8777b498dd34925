"""Random parameters of a batch of views, one set a sample, as torchvision's transforms draw them.

An operation that does not apply to a sample gets neutral parameters (factor 1, shift 0, an empty box), so later code
needs no branches. All numbers of a batch come from one call of the generator, and each operation always takes the same
columns: policies that share a seed share their geometry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lemon.schema import VIEW_PX
from lemon.views.policy import Crop, Erasing, Jitter, ViewRecipe

TRIES = 10
"""Attempts at a box that fits, as in torchvision's RandomResizedCrop and RandomErasing."""
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""How ``ViewParameters.order`` names the operations; torchvision's ColorJitter numbers them so."""
NO_SOLARIZE = 2.0
"""A threshold that no value reaches."""


class ViewParameters(NamedTuple):
    """What is done to each of B samples; on the images' device."""

    angle: torch.Tensor  # [B] degrees, counter-clockwise
    crop: torch.Tensor  # [B, 4] top, left, height, width in px of the 40x40 crop; whole numbers
    flip: torch.Tensor  # [B] bool
    order: torch.Tensor  # [B, 4] int64: a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE
    brightness: torch.Tensor  # [B] factor
    contrast: torch.Tensor  # [B] factor
    saturation: torch.Tensor  # [B] factor
    hue: torch.Tensor  # [B] shift in turns
    grayscale: torch.Tensor  # [B] bool
    blur_sigma: torch.Tensor  # [B] px; 0 leaves the sample sharp
    solarize_from: torch.Tensor  # [B] threshold
    erase: torch.Tensor  # [B, 4] top, left, height, width in px of the view; whole numbers, height 0 for none

    def rows(self, start: int, stop: int) -> ViewParameters:
        """The parameters of samples ``start`` to ``stop``."""
        return ViewParameters(*(field[start:stop] for field in self))


class _Uniforms:
    """Columns of one matrix of uniform numbers in [0, 1), handed out in order."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.used = values, 0

    def take(self, columns: int) -> torch.Tensor:
        self.used += columns
        return self.values[:, self.used - columns : self.used]  # [B, columns]

    def one(self) -> torch.Tensor:
        return self.take(1).squeeze(1)  # [B]


_COLUMNS = 2 + (2 * TRIES + 2) + 1 + 4 + 4 + 1 + 2 + 1 + (1 + 2 * TRIES + 2)


def draw_view_parameters(
    recipe: ViewRecipe, *, count: int, size_px: int, generator: torch.Generator | None, device: torch.device
) -> ViewParameters:
    """Draw the parameters of ``count`` views of ``size_px``; nothing waits for the device.

    Args:
        recipe: probabilities and ranges.
        count: samples, B.
        size_px: side of the view, which boxes to erase are drawn in.
        generator: on ``device``; None takes torch's default one.
        device: where the parameters go.
    """
    uniform = _Uniforms(torch.rand(count, _COLUMNS, generator=generator, device=device))
    flip = uniform.one() < recipe.flip_p
    angle = uniform.one() * recipe.rotation_degrees
    crop = _draw_crop(recipe.crop, uniform)
    brightness, contrast, saturation, hue = _draw_jitter(recipe.jitter, uniform)
    order = uniform.take(4).argsort(dim=1)
    grayscale = uniform.one() < recipe.grayscale_p
    blurred, sigma = uniform.one() < recipe.blur.p, _between(uniform.one(), recipe.blur.sigma)
    solarized = uniform.one() < recipe.solarize.p
    return ViewParameters(
        angle=angle,
        crop=crop,
        flip=flip,
        order=order,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grayscale=grayscale,
        blur_sigma=sigma * blurred,
        solarize_from=torch.where(solarized, recipe.solarize.threshold, NO_SOLARIZE),
        erase=_draw_erasing(recipe.erasing, uniform, side_px=size_px),
    )


def _between(uniform: torch.Tensor, limits: tuple[float, float]) -> torch.Tensor:
    return limits[0] + (limits[1] - limits[0]) * uniform


def _draw_jitter(jitter: Jitter, uniform: _Uniforms) -> tuple[torch.Tensor, ...]:
    """Factors of brightness, contrast and saturation, and the shift of hue, [B] each; neutral where not applied."""
    applied = uniform.one() < jitter.p
    drawn = []
    for strength in (jitter.brightness, jitter.contrast, jitter.saturation):
        factor = _between(uniform.one(), (max(0.0, 1 - strength), 1 + strength))
        drawn.append(torch.where(applied, factor, 1.0))
    hue = _between(uniform.one(), (-jitter.hue, jitter.hue))
    return *drawn, hue * applied


def _draw_sizes(
    uniform: _Uniforms, *, scale: tuple[float, float], ratio: tuple[float, float], side_px: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidate sides of boxes, [B, TRIES] each: sqrt(area * ratio) and sqrt(area / ratio), in whole px."""
    area = _between(uniform.take(TRIES), scale) * side_px**2
    aspect = _between(uniform.take(TRIES), (math.log(ratio[0]), math.log(ratio[1]))).exp()
    return (area * aspect).sqrt().round(), (area / aspect).sqrt().round()


def _first(candidates: torch.Tensor, fits: torch.Tensor, otherwise: float) -> torch.Tensor:
    """The first candidate of each row that fits, [B, TRIES] -> [B]."""
    at = fits.int().argmax(dim=1, keepdim=True)
    return torch.where(fits.any(dim=1), candidates.gather(1, at).squeeze(1), otherwise)


def _place(uniform: torch.Tensor, *, length: torch.Tensor, side_px: int) -> torch.Tensor:
    return (uniform * (side_px - length + 1)).floor()


def _draw_crop(crop: Crop, uniform: _Uniforms) -> torch.Tensor:
    """torchvision's RandomResizedCrop.get_params: [B, 4]."""
    side = VIEW_PX
    widths, heights = _draw_sizes(uniform, scale=crop.scale, ratio=crop.ratio, side_px=side)
    fits = (widths > 0) & (widths <= side) & (heights > 0) & (heights <= side)
    low, high = crop.ratio
    # Where no attempt fits: the largest centred box of an allowed shape.
    whole_width = side if high >= 1 else round(side * high)
    whole_height = side if low <= 1 else round(side / low)
    width, height = _first(widths, fits, whole_width), _first(heights, fits, whole_height)
    top = _place(uniform.one(), length=height, side_px=side)
    left = _place(uniform.one(), length=width, side_px=side)
    has_fit = fits.any(dim=1)
    top = torch.where(has_fit, top, (side - whole_height) // 2)
    left = torch.where(has_fit, left, (side - whole_width) // 2)
    return torch.stack([top, left, height, width], dim=1)


def _draw_erasing(erasing: Erasing, uniform: _Uniforms, *, side_px: int) -> torch.Tensor:
    """torchvision's RandomErasing.get_params: [B, 4], an empty box where nothing is erased."""
    applied = uniform.one() < erasing.p
    heights, widths = _draw_sizes(uniform, scale=erasing.scale, ratio=erasing.ratio, side_px=side_px)
    fits = (heights < side_px) & (widths < side_px)
    height, width = _first(heights, fits, 0.0) * applied, _first(widths, fits, 0.0) * applied
    top = _place(uniform.one(), length=height, side_px=side_px)
    left = _place(uniform.one(), length=width, side_px=side_px)
    return torch.stack([top, left, height, width], dim=1)
