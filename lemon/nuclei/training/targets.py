"""What the network is to say: the reference's targets (10.21105/joss.07022) for a batch of windows, on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lemon.nuclei.training.windows import MARGIN_PX, Windows


@dataclass(frozen=True)
class Targets:
    """Targets of B windows.

    Attributes:
        mask: int64 [B, S, S], 1 where a pixel is nucleus.
        hv_maps: float32 [B, 2, S, S]: horizontal and vertical, -1 to 1 across the box of a nucleus, 0 outside.
        map_weight: float32 [B, S, S]: 0 on nuclei that are cut, whose maps cannot be known, and outside the image.
        mask_weight: float32 [B, S, S]: 0 outside the image.
        edge: bool [B, S, S]: background within 2 px of a nucleus.
    """

    mask: Tensor
    hv_maps: Tensor
    map_weight: Tensor
    mask_weight: Tensor
    edge: Tensor


def make_targets(windows: Windows) -> Targets:
    """Targets of windows.

    Maps are those of the nucleus as it lies in the window, turned and scaled, so they are made anew for each window.
    """
    labels = windows.labels
    hv_maps, cut = _maps(labels, windows.cut)
    nucleus = labels > 0
    edge = (F.max_pool2d(nucleus.float(), 5, stride=1, padding=2) > 0) & ~nucleus
    inner = slice(MARGIN_PX, -MARGIN_PX)
    known = windows.known.float()
    return Targets(
        mask=nucleus[:, inner, inner].long(),
        hv_maps=hv_maps[:, :, inner, inner],
        map_weight=torch.where(cut, 0.0, 1.0)[:, inner, inner] * known,
        mask_weight=known,
        edge=edge[:, inner, inner],
    )


def _maps(labels: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Maps float32 [B, 2, H, W], and bool [B, H, W] where a nucleus is cut by its image or by the border here."""
    batch, height, width = labels.shape
    count = cut.shape[1]
    device = labels.device
    # Background goes to bins of its own, many, because writing to one from everywhere would be slow.
    spread = torch.arange(height * width, device=device).view(1, height, width)
    row = torch.arange(batch, device=device)[:, None, None] * count
    bins = torch.where(labels > 0, labels + row, batch * count + spread)
    cuts = torch.gather(cut, 1, labels.flatten(1)).view_as(labels)
    maps = []
    for size, position in (
        (width, torch.arange(width, device=device).expand(batch, height, width)),
        (height, torch.arange(height, device=device)[:, None].expand(batch, height, width)),
    ):
        flat, at = bins.flatten(), position.flatten().int()
        empty = torch.zeros(batch * count + height * width, dtype=torch.int32, device=device)
        low = empty.fill_(size).scatter_reduce(0, flat, at, "amin")[flat].view_as(labels)
        high = empty.fill_(-1).scatter_reduce(0, flat, at, "amax")[flat].view_as(labels)
        cuts = cuts | (low == 0) | (high == size - 1)
        half = (high - low).float() / 2
        maps.append(torch.where(half > 0, (position - low - half) / half.clamp(min=0.5), 0.0))
    nucleus = labels > 0
    cuts = cuts & nucleus
    return torch.stack(maps, 1) * (nucleus & ~cuts)[:, None], cuts
