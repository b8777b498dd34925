"""How windows are made to look as if another laboratory had stained, and another scanner seen them.

In the order of nature: stain, optics, sampling (at 20x for a part of the windows), noise, JPEG, and enlargement back to
40x. All of a batch at once, on its device; nothing waits for the host.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from skimage.color import hed_from_rgb, rgb_from_hed
from torch import Tensor

_TAPS = 4  # a blur reaches this many pixels to each side
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
# Quantisation of quality 50 (ITU-T T.81, annex K).
_Q_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_Q_CHROMA = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 beyond


@dataclass(frozen=True)
class Appearance:
    """Ranges of what is varied; shares are of the windows of a batch.

    Attributes:
        stain: factors of the stains' optical densities are 1 +- this.
        stain_offset: optical density added to each stain, +-.
        channel: factors of the optical densities of red, green and blue, 1 +- this: scanners' white points.
        contrast: factor of the contrast about the mean, 1 +- this.
        brightness: added to all, +-.
        blur_share, blur_px: share of the windows that are out of focus, and the largest sigma.
        sharpen_share: share of the windows sharpened as some scanners do.
        low_share: share of the windows seen at about 20x and enlarged again.
        low_sides: lowest and highest side of such a window, as a share of its pixels.
        noise: largest sigma of the noise of a pixel.
        jpeg_share, jpeg_quality: share of the windows that go through JPEG, and the range of its quality.
    """

    stain: float = 0.35
    stain_offset: float = 0.06
    channel: float = 0.1
    contrast: float = 0.2
    brightness: float = 0.06
    blur_share: float = 0.3
    blur_px: float = 1.3
    sharpen_share: float = 0.1
    low_share: float = 0.35
    low_sides: tuple[float, float] = (0.4, 0.625)
    noise: float = 0.03
    jpeg_share: float = 0.4
    jpeg_quality: tuple[float, float] = (40.0, 95.0)


def vary(images: Tensor, appearance: Appearance, *, generator: torch.Generator, host: np.random.Generator) -> Tensor:
    """float32 [B, 3, S, S] in [0, 1] to the same, S a multiple of 32.

    Windows are drawn independently of each other, so the first of a batch, which are those seen at 20x, are as random
    as any.

    Args:
        images: windows.
        appearance: what is varied.
        generator: on the images' device, for what each window has of its own.
        host: for what all windows at 20x of a batch share: their size and how they are enlarged.
    """
    draws = _Draws(len(images), generator)
    images = _stained(images, appearance, draws)
    images = _blurred(images, draws.share(appearance.blur_share) * appearance.blur_px * draws.unit())
    soft = _blurred(images, torch.ones_like(draws.unit()))
    images = images + _each(draws.share(appearance.sharpen_share) * draws.unit()) * (images - soft)
    n_low = round(appearance.low_share * len(images))
    noise = appearance.noise * draws.unit()
    quality = draws.between(*appearance.jpeg_quality)
    through_jpeg = draws.share(appearance.jpeg_share)

    def captured(part: Tensor, rows: slice) -> Tensor:
        part = part + _each(noise[rows]) * torch.randn(part.shape, generator=generator, device=part.device)
        return torch.where(_each(through_jpeg[rows]) > 0, _jpeg(part.clamp(0, 1), quality[rows]), part)

    size = images.shape[-1]
    low, high = (round(share * size / 16) for share in appearance.low_sides)
    side = 16 * int(host.integers(low, high + 1)) if host.random() < 0.5 else size // 2
    enlarge = ("bilinear", "bicubic")[int(host.integers(2))]
    coarse = F.interpolate(images[:n_low], size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    coarse = F.interpolate(captured(coarse, slice(n_low)), size=(size, size), mode=enlarge, align_corners=False)
    fine = captured(images[n_low:], slice(n_low, None))
    return torch.cat((coarse, fine)).clamp(0, 1)


@dataclass(frozen=True)
class _Draws:
    """One value a window."""

    count: int
    generator: torch.Generator

    def unit(self) -> Tensor:
        return torch.rand(self.count, generator=self.generator, device=self.generator.device)

    def between(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.unit()

    def share(self, share: float) -> Tensor:
        return (self.unit() < share).float()


def _each(values: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return values[:, None, None, None]


def _stained(images: Tensor, appearance: Appearance, draws: _Draws) -> Tensor:
    """Other amounts of hematoxylin and eosin, another white point, contrast and brightness."""
    fixed = _constants(images.device)
    to_stains, to_od = fixed["to_stains"], fixed["to_od"]
    spread = appearance.stain
    factors = torch.stack([draws.between(1 - spread, 1 + spread) for _ in range(3)], 1)  # [B, stains]
    offsets = torch.stack([draws.between(-appearance.stain_offset, appearance.stain_offset) for _ in range(3)], 1)
    channels = torch.stack([draws.between(1 - appearance.channel, 1 + appearance.channel) for _ in range(3)], 1)
    mix = (to_stains[None] * factors[:, None, :]) @ to_od * channels[:, None, :]  # [B, 3, 3]: od @ mix
    od = -torch.log((images * 255 + 1) / 256)
    od = torch.einsum("bchw,bcd->bdhw", od, mix) + ((offsets @ to_od) * channels)[:, :, None, None]
    images = torch.exp(-od.clamp(min=0))
    mean = images.mean((1, 2, 3), keepdim=True)
    contrast = _each(draws.between(1 - appearance.contrast, 1 + appearance.contrast))
    shift = _each(draws.between(-appearance.brightness, appearance.brightness))
    return ((images - mean) * contrast + mean + shift).clamp(0, 1)


def _blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma (px) for each window; 0 leaves it as it is."""
    taps = torch.arange(-_TAPS, _TAPS + 1, device=images.device)
    weights = torch.exp(-taps.square() / (2 * sigma.clamp(min=0.05)[:, None] ** 2))  # [B, taps]
    weights = weights / weights.sum(1, keepdim=True)
    size = images.shape[-1]
    for pad, axis in (((_TAPS, _TAPS, 0, 0), 3), ((0, 0, _TAPS, _TAPS), 2)):
        padded = F.pad(images, pad, mode="reflect")
        parts = (_each(weights[:, tap]) * padded.narrow(axis, tap, size) for tap in range(2 * _TAPS + 1))
        images = functools.reduce(torch.add, parts)
    return images


def _jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """float32 [B, 3, h, w] in [0, 1], sides multiples of 16, as JPEG (4:2:0) of a quality [B] returns it."""
    fixed = _constants(images.device)
    planes = torch.einsum("bchw,dc->bdhw", images * 255, fixed["to_ycc"])
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)
    grey = _quantised(planes[:, :1] - 128, fixed["q_luma"], scale) + 128
    colour = _quantised(F.avg_pool2d(planes[:, 1:], 2), fixed["q_chroma"], scale)
    planes = torch.cat((grey, F.interpolate(colour, scale_factor=2.0, mode="nearest")), 1)
    return torch.einsum("bdhw,cd->bchw", planes, fixed["to_rgb"]) / 255


def _quantised(planes: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """[B, c, h, w] with the coefficients of each 8x8 block rounded to multiples of the table."""
    batch, channels, height, width = planes.shape
    cosines = _constants(planes.device)["cosines"]
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    steps = (table * scale[:, None, None]).clamp(min=1)[:, None, None, None]
    coefficients = cosines @ blocks @ cosines.t()
    blocks = cosines.t() @ (torch.round(coefficients / steps) * steps) @ cosines
    return blocks.transpose(3, 4).reshape(planes.shape)


@functools.cache
def _constants(device: torch.device) -> dict[str, Tensor]:
    """Matrices on a device, float32; made once, because a copy to the device waits for it."""
    k = np.arange(8)
    cosines = np.cos(np.pi * (2 * k[None] + 1) * k[:, None] / 16) / 2  # the discrete cosine transform of 8 values
    cosines[0] /= np.sqrt(2)
    chroma = np.full((8, 8), 99)
    chroma[:4, :4] = _Q_CHROMA
    to_ycc = np.array(_TO_YCC)
    matrices = {
        "to_stains": hed_from_rgb,  # optical density, a row of three, times this
        "to_od": rgb_from_hed,
        "to_ycc": to_ycc,
        "to_rgb": np.linalg.inv(to_ycc),
        "cosines": cosines,
        "q_luma": _Q_LUMA,
        "q_chroma": chroma,
    }
    return {name: torch.tensor(np.asarray(m), dtype=torch.float32, device=device) for name, m in matrices.items()}
