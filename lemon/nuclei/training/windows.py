"""Windows of labelled images, drawn, turned and scaled on the device where the images stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lemon.nuclei.training.images import Labelled

MARGIN_PX = 32
"""Labels are looked up this far around a window, so that maps of nuclei at its border are those of whole nuclei."""


@dataclass(frozen=True)
class Bank:
    """Labelled images laid end to end on a device.

    Attributes:
        pixels: uint8 [P, 3].
        labels: int32 [P], instances counted from 1 in each image.
        cut: bool [N, labels + 1], whether the border of an image cuts a nucleus.
        start: int64 [N], first pixel of each image.
        height, width: int64 [N].
        odds: float [N], how often a window is drawn from each image, relative to others.
    """

    pixels: Tensor
    labels: Tensor
    cut: Tensor
    start: Tensor
    height: Tensor
    width: Tensor
    odds: Tensor

    @classmethod
    def of(
        cls, images: Sequence[Labelled], *, device: torch.device | str, odds: Mapping[str, float] | None = None
    ) -> Bank:
        """Put images on a device.

        Windows are drawn from each source with the odds given (1 where none are), and within it in proportion to the
        square root of an image's area. Raises ValueError for no images.
        """
        if not images:
            raise ValueError("images: got none, expected at least one image with its instance map")
        sides = np.array([image.instances.shape for image in images], np.int64)  # [N, 2]
        areas = sides.prod(1)
        maps = [_renumbered(image.instances) for image in images]
        cut = np.zeros((len(images), 1 + max(int(m.max()) for m in maps)), bool)
        for row, m in zip(cut, maps, strict=True):
            row[np.unique(np.concatenate([m[0], m[-1], m[:, 0], m[:, -1]]))] = True
        weights = np.sqrt(areas.astype(np.float64))
        sources = np.array([image.source for image in images])
        for source in set(sources.tolist()):
            of_source = sources == source
            weights[of_source] *= (odds or {}).get(source, 1.0) / weights[of_source].sum()
        return cls(
            pixels=torch.from_numpy(np.concatenate([i.image.reshape(-1, 3) for i in images])).to(device),
            labels=torch.from_numpy(np.concatenate([m.ravel() for m in maps])).to(device),
            cut=torch.from_numpy(cut).to(device),
            start=torch.from_numpy(np.concatenate([[0], np.cumsum(areas)[:-1]])).to(device),
            height=torch.from_numpy(sides[:, 0].copy()).to(device),
            width=torch.from_numpy(sides[:, 1].copy()).to(device),
            odds=torch.from_numpy(weights.astype(np.float32)).to(device),
        )

    @property
    def device(self) -> torch.device:
        """Where the images are."""
        return self.pixels.device

    def nucleus_share(self) -> float:
        """Share of all pixels that are nuclei."""
        return float((self.labels > 0).float().mean())


def _renumbered(instances: np.ndarray) -> np.ndarray:
    """Instances int32 [H, W] counted from 1 without gaps."""
    values, dense = np.unique(instances, return_inverse=True)
    return (dense.reshape(instances.shape) + (1 if values[0] != 0 else 0)).astype(np.int32)


@dataclass(frozen=True)
class Geometry:
    """How windows lie in their images.

    Attributes:
        scale: lowest and highest enlargement.
        plain_share: share of windows that are turned and mirrored only, so that each pixel is one of the image; the
            others are interpolated, which blurs a little, and half of them stand at any angle.
    """

    scale: tuple[float, float] = (0.8, 1.4)
    plain_share: float = 0.35


@dataclass(frozen=True)
class Windows:
    """A batch of windows.

    Attributes:
        images: float32 [B, 3, S, S] in [0, 1].
        labels: int64 [B, S + 2 M, S + 2 M] with M = ``MARGIN_PX``: instances of each image, and 0.
        known: bool [B, S, S], False outside the image, where pixels are mirrored ones.
        cut: bool [B, labels + 1], of the image of each window.
    """

    images: Tensor
    labels: Tensor
    known: Tensor
    cut: Tensor


def draw(bank: Bank, *, batch: int, size_px: int, geometry: Geometry | None, generator: torch.Generator) -> Windows:
    """Windows at random places; without a geometry upright and unscaled."""
    device = bank.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    image = torch.multinomial(bank.odds, batch, replacement=True, generator=generator)  # [B]
    turn, plain = _turns(batch, geometry=geometry, uniform=uniform)
    side = torch.stack((bank.width, bank.height))[:, image].float()  # [2, B]: x, y
    reach = (turn.abs().sum(2).t() * (size_px / 2)).minimum(side / 2)  # half the window's extent in the image
    centre = reach + uniform(2, batch) * (side - 2 * reach) - 0.5
    whole = torch.where(plain, centre.round() - 0.5, centre)  # windows have an even number of pixels
    offsets = torch.arange(-MARGIN_PX, size_px + MARGIN_PX, device=device, dtype=torch.float32) - (size_px - 1) / 2
    x, y = (
        whole[axis][:, None, None]
        + turn[:, axis, 0, None, None] * offsets
        + turn[:, axis, 1, None, None] * offsets[:, None]
        for axis in (0, 1)
    )  # [B, S + 2 M, S + 2 M] each
    labels, inside = _nearest(bank, image, x, y)
    inner = slice(MARGIN_PX, MARGIN_PX + size_px)
    images = _bilinear(bank, image, x[:, inner, inner], y[:, inner, inner])
    return Windows(images=images, labels=labels, known=inside[:, inner, inner], cut=bank.cut[image])


def _turns(batch: int, *, geometry: Geometry | None, uniform: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Matrices [B, 2, 2] from the window's (x, y) to the image's, and which of them keep the grid of pixels [B]."""
    if geometry is None:
        like = uniform(batch)
        return torch.eye(2, device=like.device).expand(batch, 2, 2), torch.ones_like(like, dtype=torch.bool)
    plain = uniform(batch) < geometry.plain_share
    quarter = torch.floor(4 * uniform(batch)) * (np.pi / 2)
    angle = torch.where(plain | (uniform(batch) < 0.5), quarter, 2 * np.pi * uniform(batch))
    low, high = (float(np.log(s)) for s in geometry.scale)
    scale = torch.where(plain, 1.0, torch.exp(low + (high - low) * uniform(batch)))
    mirror = torch.where(uniform(batch) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    turn = torch.stack((torch.stack((cos * mirror, -sin), 1), torch.stack((sin * mirror, cos), 1)), 1)
    # Quarter turns are exact, so that plain windows fall onto pixels.
    return torch.where(plain[:, None, None], turn.round(), turn / scale[:, None, None]), plain


def _mirrored(position: Tensor, size: Tensor) -> Tensor:
    """Whole positions, any integer, mirrored at the borders into 0 to size - 1."""
    period = (2 * size - 2).clamp(min=1)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded).minimum(size - 1)


def _nearest(bank: Bank, image: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 at positions [B, h, w] in images [B], 0 outside; and which positions are inside."""
    height, width = bank.height[image][:, None, None], bank.width[image][:, None, None]
    column, row = x.round().long(), y.round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = bank.start[image][:, None, None] + _mirrored(row, height) * width + _mirrored(column, width)
    return torch.where(inside, bank.labels[place], 0).long(), inside


def _bilinear(bank: Bank, image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Colours float32 [B, 3, h, w] in [0, 1] at positions [B, h, w]; beyond an image it is mirrored."""
    height, width = bank.height[image][:, None, None], bank.width[image][:, None, None]
    start = bank.start[image][:, None, None]
    left, top = x.floor(), y.floor()
    right_share, low_share = (x - left)[..., None], (y - top)[..., None]
    columns = [_mirrored(left.long() + step, width) for step in (0, 1)]
    rows = [start + _mirrored(top.long() + step, height) * width for step in (0, 1)]
    above, below = (
        torch.lerp(bank.pixels[row + columns[0]].float(), bank.pixels[row + columns[1]].float(), right_share)
        for row in rows
    )
    return torch.lerp(above, below, low_share).permute(0, 3, 1, 2) / 255


def whole(labelled: Labelled, *, device: torch.device | str = "cpu") -> Windows:
    """A batch of one: a whole image as its window, upright; of sides that need not be equal."""
    bank = Bank.of([labelled], device=device)
    height, width = labelled.instances.shape
    labels = bank.labels.view(1, height, width).long()
    return Windows(
        images=bank.pixels.view(1, height, width, 3).permute(0, 3, 1, 2) / 255,
        labels=F.pad(labels, (MARGIN_PX,) * 4),
        known=torch.ones_like(labels, dtype=torch.bool),
        cut=bank.cut,
    )
