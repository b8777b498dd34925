"""Rotation, resized crop and flip: in one resampling, or one after the other as torchvision does it.

Coordinates are continuous: pixel i covers [i, i + 1), its centre is i + 0.5. Sampling is bilinear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lemon.schema import CELL_PX, VIEW_PX


def sample_views(
    cells: torch.Tensor,
    *,
    angle: torch.Tensor,
    crop: torch.Tensor,
    flip: torch.Tensor,
    size_px: int,
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """RotationCrop, RandomResizedCrop and flip as one bilinear resampling of the stored cells.

    DEVIATION: torchvision resamples twice (rotation, then resize), which blurs twice, and it repeats the crop's border
    pixels where this reads the cell beyond the crop. No low-pass filter precedes it: a crop is at most 40 px wide, so a
    view of 40 px never has fewer pixels than its crop, and a local crop of 24 px comes from at most 26.

    Args:
        cells: [B, 3, 60, 60] float, any strides.
        angle: [B] degrees, counter-clockwise, about the cell's centre.
        crop: [B, 4] top, left, height, width in px of the rotated 40x40 crop.
        flip: [B] bool, horizontal.
        size_px: side s of a view.
        extra: [2, A] further points (x, y) of every cell, in [-1, 1] over its width; sampled as they are.

    Returns:
        [B, 3, s * s + A]: the views' pixels row by row, then the extra points.
    """
    grid = _view_grid(angle=angle, crop=crop, flip=flip, size_px=size_px).flatten(2)  # [B, 2, s * s]
    if extra is not None:
        grid = torch.cat([grid, extra.expand(grid.shape[0], 2, -1)], dim=2)
    # The grid stays planar: grid_sample reads its strides, and [..., 2] innermost would cost a transposition.
    return F.grid_sample(cells, grid[:, :, None].permute(0, 2, 3, 1), align_corners=False).squeeze(2)


def _view_grid(*, angle: torch.Tensor, crop: torch.Tensor, flip: torch.Tensor, size_px: int) -> torch.Tensor:
    """Where each view pixel lies in its cell, [B, 2, s, s]: x then y, -1 to 1 over the 60 px."""
    along = (torch.arange(size_px, device=angle.device, dtype=torch.float32) + 0.5) / size_px  # [s], 0 to 1
    top, left, height, width = crop.unbind(1)
    mirrored = torch.where(flip[:, None], 1 - along, along)  # [B, s]
    x = left[:, None] + mirrored * width[:, None] - VIEW_PX / 2  # [B, s] px from the centre
    y = top[:, None] + along * height[:, None] - VIEW_PX / 2
    radians = torch.deg2rad(angle)
    cos, sin = radians.cos() * (2 / CELL_PX), radians.sin() * (2 / CELL_PX)
    columns = torch.stack([cos[:, None] * x, sin[:, None] * x], dim=1)  # [B, 2, s]
    rows = torch.stack([-sin[:, None] * y, cos[:, None] * y], dim=1)
    return columns[:, :, None, :] + rows[:, :, :, None]


def lattice(side: int) -> torch.Tensor:
    """``side`` x ``side`` evenly spread points of a cell, [2, side**2] in [-1, 1]: for means over the whole cell."""
    # Moved to the nearest corner of four pixels: bilinear sampling then averages all four.
    step = CELL_PX / side
    corners = (torch.arange(side, dtype=torch.float64).add(0.5).mul(step)).round()
    points = (corners * (2 / CELL_PX) - 1).float()
    return torch.stack([points.repeat(side), points.repeat_interleave(side)])


def rotate_crop(cells: torch.Tensor, *, angle: torch.Tensor) -> torch.Tensor:
    """torchvision's ``rotate`` (bilinear, about the centre) and then ``center_crop``: [B, 3, 60, 60] -> [B, 3, 40, 40].

    No pixel of the crop comes from outside the cell at any angle: 40 * sqrt(2) = 56.6 < 60.
    """
    batch, crop = cells.shape[0], torch.tensor([0.0, 0.0, VIEW_PX, VIEW_PX], device=cells.device)
    still = torch.zeros(batch, dtype=torch.bool, device=cells.device)
    views = sample_views(cells, angle=angle, crop=crop.expand(batch, 4), flip=still, size_px=VIEW_PX)
    return views.unflatten(2, (VIEW_PX, VIEW_PX))


def resized_crop(images: torch.Tensor, *, crop: torch.Tensor, size_px: int) -> torch.Tensor:
    """torchvision's ``resized_crop`` (bilinear) with one box a sample: [B, 3, 40, 40] -> [B, 3, s, s].

    Pixels beyond the box repeat its border. Not antialiased, which only matters for boxes wider than ``size_px``.
    """
    side = images.shape[-1]
    along = (torch.arange(size_px, device=images.device, dtype=torch.float32) + 0.5) / size_px  # [s]
    top, left, height, width = crop[:, :, None].unbind(1)  # [B, 1] each
    axes = []
    for start, length in ((left, width), (top, height)):
        position = start + along * length  # [B, s]
        axes.append(position.maximum(start + 0.5).minimum(start + length - 0.5) * (2 / side) - 1)
    x, y = axes
    grid = torch.stack([x[:, None, :].expand(-1, size_px, -1), y[:, :, None].expand(-1, -1, size_px)], dim=3)
    return F.grid_sample(images, grid, align_corners=False)
