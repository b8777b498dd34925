"""Macenko's stain separation and its perturbation, batched over cells.

Sources: Macenko et al. (2009), A method for normalizing histology slides for quantitative analysis; the parameters
(Io 240, transparency 0.15, 1st and 99th percentile) are those of torchstain, whose stain matrix the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lemon.views.images import check_images
from lemon.views.stain import StainDraw

LIGHT = 240.0
"""Transmitted light: the grey level of no stain."""
TRANSPARENT_OD = 0.15
"""A pixel with less optical density than this in any channel is background."""
PERCENTILE = 1.0
"""Angles below this percentile and above its complement are outliers."""
_FEWEST_PIXELS = 36
"""Stained pixels (1 % of a cell) below which no plane is fitted."""
_SMALLEST_SINE = 1e-2
"""Sine of the angle of the two stains below which they are one stain and cannot be distinguished."""


class StainMatrix(NamedTuple):
    """Unit vectors of optical density of the two stains of each image."""

    vectors: torch.Tensor  # [B, 3, 2] float32: RGB by (hematoxylin, eosin)
    is_valid: torch.Tensor  # [B] bool: False for white, constant or single-stained images, whose vectors mean nothing


def stain_matrix(images_u8: torch.Tensor) -> StainMatrix:
    """Estimate the stain vectors of each image.

    The plane of the two largest principal axes of optical density holds both stains; the extreme angles (percentiles)
    in it are the stains. Angles are taken from the mean pixel, so they cannot wrap around; the plane's axes, whose
    signs are arbitrary, do not enter. On CUDA the eigenvectors make this wait for the device once.

    Args:
        images_u8: [B, H, W, 3] uint8 RGB.

    Returns:
        vectors [B, 3, 2], hematoxylin first (the one with more red density), and which images have them.
    """
    check_images(images_u8)
    density = _density(images_u8)  # [B, P, 3]
    stained = (density >= TRANSPARENT_OD).all(dim=2)  # [B, P]
    count = stained.sum(dim=1)
    weight = stained[:, :, None].double()
    mean = (density * weight).sum(dim=1) / count.clamp_min(1)[:, None]  # [B, 3] float64
    centred = (density - mean[:, None]) * weight
    _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)  # ascending
    plane = axes[:, :, 1:]  # [B, 3, 2]

    along = torch.einsum("bc,bcd->bd", mean, plane)
    along = along / along.norm(dim=1, keepdim=True).clamp_min(1e-12)  # [B, 2] direction of the mean pixel
    across = torch.stack([-along[:, 1], along[:, 0]], dim=1)
    directions = plane @ torch.stack([along, across], dim=2)  # [B, 3, 2] orthonormal, mean pixel first
    flat = density.double() @ directions  # [B, P, 2]
    angle = torch.atan2(flat[:, :, 1], flat[:, :, 0])
    low, high = _percentiles(angle, stained, count)

    first, second = (directions @ torch.stack([a.cos(), a.sin()], dim=1)[:, :, None] for a in (low, high))
    red_first = (first[:, :1] > second[:, :1]).expand_as(first)
    vectors = torch.cat([torch.where(red_first, first, second), torch.where(red_first, second, first)], dim=2)
    is_valid = (count >= _FEWEST_PIXELS) & ((high - low).sin() > _SMALLEST_SINE)
    return StainMatrix(vectors.float(), is_valid)


def perturb_stains(images_u8: torch.Tensor, draws: Sequence[StainDraw]) -> list[torch.Tensor]:
    """Scale and shift each image's stain concentrations: c -> c * scale + shift, once a draw.

    The part of the optical density outside the stains' plane is kept, so scale 1 and shift 0 give the image back.
    Images [B, H, W, 3] uint8 -> one such tensor a draw; where no stains are found or ``apply`` is False, unchanged.
    """
    vectors, is_valid = stain_matrix(images_u8)
    density = _density(images_u8)  # [B, P, 3]
    concentration = density @ _pseudo_inverse(vectors).transpose(1, 2)  # [B, P, 2]
    perturbed = []
    for draw in draws:
        change = concentration * (draw.scale - 1)[:, None] + draw.shift[:, None]
        moved = density + change @ vectors.transpose(1, 2)
        rgb = (LIGHT * (-moved).exp() - 1).round().clamp(0, 255).to(torch.uint8).view(images_u8.shape)
        perturbed.append(torch.where((draw.apply & is_valid)[:, None, None, None], rgb, images_u8))
    return perturbed


def draw_perturbations(
    *,
    count: int,
    p: float,
    scale: tuple[float, float],
    shift: tuple[float, float],
    generator: torch.Generator,
    device: torch.device,
) -> StainDraw:
    """Uniform factors and shifts of both concentrations of each image, applied with probability ``p``."""
    uniform = torch.rand(count, 5, generator=generator, device=device)
    factors = scale[0] + (scale[1] - scale[0]) * uniform[:, 1:3]
    shifts = shift[0] + (shift[1] - shift[0]) * uniform[:, 3:5]
    return StainDraw(apply=uniform[:, 0] < p, shift=shifts, scale=factors)


def _density(images_u8: torch.Tensor) -> torch.Tensor:
    """Optical density [B, P, 3] float32; + 1 keeps black finite."""
    return -((images_u8.flatten(1, 2).float() + 1) / LIGHT).log()


def _percentiles(angle: torch.Tensor, stained: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest-rank percentiles of the stained pixels' angles, [B] each (torchstain's rule)."""
    ordered = torch.where(stained, angle, torch.inf).sort(dim=1).values
    last = (count - 1).clamp_min(0).double()
    ranks = [(0.01 * q * last).round().long() for q in (PERCENTILE, 100.0 - PERCENTILE)]
    low, high = (ordered.gather(1, rank[:, None]).squeeze(1) for rank in ranks)
    # Without a stained pixel both are infinite; 0 keeps the arithmetic finite, and `is_valid` is False.
    return low.nan_to_num(posinf=0.0), high.nan_to_num(posinf=0.0)


def _pseudo_inverse(vectors: torch.Tensor) -> torch.Tensor:
    """Least squares for two unit vectors, [B, 3, 2] -> [B, 2, 3], in closed form; finite where they coincide."""
    cosine = (vectors[:, :, 0] * vectors[:, :, 1]).sum(dim=1)[:, None, None]  # [B, 1, 1]
    swapped = vectors.flip(2)
    return ((vectors - cosine * swapped) / (1 - cosine**2).clamp_min(_SMALLEST_SINE**2)).transpose(1, 2)
