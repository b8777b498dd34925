"""LAB and HSV as OpenCV's 8-bit conversions give them, and scikit-image's HED, batched on any device.

Images are planar here: [B, 3, P], P pixels. OpenCV works in fixed point with tables; these are its documented formulas
in float32 with the same rounding, so single values differ by 1 at times (see tests/views/test_stain.py).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch

Space = Literal["lab", "hsv", "hed"]
SPACES: tuple[Space, ...] = ("lab", "hsv", "hed")

HUE_TURN = 180.0
"""A full turn of hue in OpenCV's 8-bit HSV."""

# sRGB to XYZ and back, and the D65 white point, as OpenCV's documentation of cvtColor gives them.
_XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_RGB_FROM_XYZ = ((3.240479, -1.537150, -0.498535), (-0.969256, 1.875991, 0.041556), (0.055648, -0.204043, 1.057311))
_WHITE = (0.950456, 1.0, 1.088754)
# Ruifrok and Johnston (2001): optical densities of haematoxylin, eosin and DAB, as in skimage.color.rgb_from_hed.
_RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
_HED_FLOOR = 1e-6


def _inverse(rows: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in torch.linalg.inv(torch.tensor(rows, dtype=torch.float64)).tolist())


# Densities are row vectors in skimage (density = hed @ rgb_from_hed); _mix takes a row for each output channel.
_DENSITY_FROM_HED = tuple(zip(*_RGB_FROM_HED, strict=True))
_HED_FROM_DENSITY = tuple(zip(*_inverse(_RGB_FROM_HED), strict=True))


def to_space(rgb: torch.Tensor, *, space: Space) -> torch.Tensor:
    """Planar RGB in another colour space.

    Args:
        rgb: [B, 3, P] uint8.
        space: ``lab`` (L * 255 / 100, a + 128, b + 128), ``hsv`` (H 0 to 179, S, V), both rounded as OpenCV's 8-bit
            images are, or ``hed`` (unrounded, on the scale of skimage.color.rgb2hed).

    Returns:
        [B, 3, P] float32.
    """
    if space == "lab":
        return _lab_from_rgb(rgb)
    if space == "hsv":
        return _hsv_from_rgb(rgb.float())
    if space == "hed":
        return _hed_from_rgb(rgb)
    raise ValueError(f"space: got {space!r}; expected one of {', '.join(SPACES)}")


def from_space(values: torch.Tensor, *, space: Space) -> torch.Tensor:
    """The inverse of ``to_space``: [B, 3, P] float -> [B, 3, P] uint8 RGB.

    LAB and HSV are first cut to OpenCV's 8-bit values as a cast does it: clipped to 0..255 and truncated; hue wraps.
    """
    if space == "lab":
        rgb = _rgb_from_lab(values.clamp(0, 255).floor())
    elif space == "hsv":
        hue = values[:, :1].floor().remainder(HUE_TURN)
        rgb = _rgb_from_hsv(torch.cat([hue, values[:, 1:].clamp(0, 255).floor()], dim=1))
    elif space == "hed":
        rgb = _rgb_from_hed(values)
    else:
        raise ValueError(f"space: got {space!r}; expected one of {', '.join(SPACES)}")
    return rgb.mul(255).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def _white(device: torch.device) -> torch.Tensor:
    return torch.tensor(_WHITE, device=device).view(1, 3, 1)


@lru_cache(maxsize=8)
def _linear_table(device: torch.device) -> torch.Tensor:
    """Linear light of the 256 values of sRGB; looked up, since a power costs several times more."""
    unit = torch.arange(256, dtype=torch.float64) / 255
    linear = torch.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055).pow(2.4))
    return linear.float().to(device)


@lru_cache(maxsize=8)
def _density_table(device: torch.device) -> torch.Tensor:
    """skimage's optical density of the 256 grey levels, in units of that of its floor."""
    unit = (torch.arange(256, dtype=torch.float64) / 255).clamp_min(_HED_FLOOR)
    return (unit.log() / math.log(_HED_FLOOR)).float().to(device)


def _look_up(table: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
    return table.index_select(0, rgb.flatten().int()).view(rgb.shape)


def _power(base: torch.Tensor, exponent: float) -> torch.Tensor:
    """``base ** exponent`` for a base of at least 0, by logarithm: half the time of pow on a CPU; 0 stays 0."""
    return base.log().mul_(exponent).exp_()


def _mix(planes: torch.Tensor, matrix: tuple[tuple[float, ...], ...]) -> list[torch.Tensor]:
    """Each output channel as a sum of the three input channels; sums, not a matmul, so TF32 cannot coarsen it."""
    first, second, third = planes.unbind(1)
    return [row[0] * first + row[1] * second + row[2] * third for row in matrix]


def _lab_from_rgb(rgb: torch.Tensor) -> torch.Tensor:
    xyz = torch.stack(_mix(_look_up(_linear_table(rgb.device), rgb), _XYZ_FROM_RGB), dim=1)  # [B, 3, P]
    ratio = xyz / _white(rgb.device)
    curve = torch.where(ratio > 0.008856, _power(ratio, 1 / 3), 7.787 * ratio + 16 / 116)
    fx, fy, fz = curve.unbind(1)
    # OpenCV's fixed-point slope: 116 * 255 / 100 = 295.8 rounded to 296.
    lab = torch.stack([296 * fy - 40.8, 500 * (fx - fy) + 128, 200 * (fy - fz) + 128], dim=1)
    return lab.round_().clamp_(0, 255)


def _rgb_from_lab(lab: torch.Tensor) -> torch.Tensor:
    lightness, a, b = lab[:, 0] * (100 / 255), lab[:, 1] - 128, lab[:, 2] - 128
    dark = lightness <= 903.3 * 0.008856
    fy = torch.where(dark, lightness / 903.3 * 7.787 + 16 / 116, (lightness + 16) / 116)
    curve = torch.stack([fy + a / 500, fy, fy - b / 200], dim=1)
    ratio = torch.where(curve > 7.787 * 0.008856 + 16 / 116, curve.pow(3), (curve - 16 / 116) / 7.787)
    xyz = ratio * _white(lab.device)
    linear = torch.stack(_mix(xyz, _RGB_FROM_XYZ), dim=1).clamp_(0, 1)
    return torch.where(linear <= 0.0031308, linear * 12.92, _power(linear, 1 / 2.4).mul_(1.055).sub_(0.055))


def _hsv_from_rgb(rgb: torch.Tensor) -> torch.Tensor:
    red, green, blue = rgb.unbind(1)
    value = torch.maximum(red, torch.maximum(green, blue))
    chroma = value - torch.minimum(red, torch.minimum(green, blue))
    safe = chroma.clamp_min(1)  # of whole numbers: 0 is the only chroma below 1, and its hue is 0
    on_green = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sector = torch.where(value == red, (green - blue) / safe, on_green)
    hue = (sector * (HUE_TURN / 6)).round()
    hue = torch.where(chroma > 0, torch.where(hue < 0, hue + HUE_TURN, hue), torch.zeros_like(hue))
    return torch.stack([hue, (255 * chroma / value.clamp_min(1)).round(), value], dim=1)


def _rgb_from_hsv(hsv: torch.Tensor) -> torch.Tensor:
    value, saturation = hsv[:, 2] / 255, hsv[:, 1] / 255
    sector = hsv[:, 0] * (6 / HUE_TURN)
    chroma = value * saturation
    # Channel n of the hexcone is value - chroma * clamp(min(k, 4 - k), 0, 1), k = (n + sector) mod 6.
    channels = []
    for offset in (5, 3, 1):
        k = (sector + offset).remainder(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def _hed_from_rgb(rgb: torch.Tensor) -> torch.Tensor:
    stains = torch.stack(_mix(_look_up(_density_table(rgb.device), rgb), _HED_FROM_DENSITY), dim=1)  # [B, 3, P]
    return stains.clamp_min_(0)  # scikit-image's convention: no negative stain


def _rgb_from_hed(hed: torch.Tensor) -> torch.Tensor:
    density = torch.stack(_mix(hed, _DENSITY_FROM_HED), dim=1)
    return density.mul_(math.log(_HED_FLOOR)).exp_().clamp_(0, 1)
