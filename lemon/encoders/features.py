"""Features of cells by an encoder, and how many directions they use."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemon.encoders.images import cell_images
from lemon.schema import CELL_PX


@torch.no_grad()
def encode_cells(
    encoder: nn.Module,
    images: Any,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_px: int,
    input_px: int | None = None,
    batch: int | None = None,
    bf16: bool = False,
) -> Tensor:
    """Features float32 [N, D] of the centre crops of cells, in evaluation mode, on the encoder's device.

    Args:
        encoder: normalised [B, 3, px, px] -> [B, D]; left in the mode that it was in.
        images: uint8 [N, 60, 60, 3], or what ``images.cell_images`` makes that of, on any device; a batch at a time
            goes to the encoder's and becomes float there. None at all gives [0, D].
        mean, std: of the three channels, in [0, 1].
        crop_px: side of the centre crop.
        input_px: side of what the encoder sees; None: crop_px, nothing is resized.
        batch: images at a time; None: as many as have the pixels of 1,024 crops of 40 px (32 of 224 px).
        bf16: compute in bfloat16 where torch's autocast does; on a GPU twice as fast or more.

    Raises:
        ValueError: images that are none of cells, with what is expected.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch: got {batch}; expected at least 1 image at a time")
    cells = cell_images(images)
    low = (CELL_PX - crop_px) // 2
    middle = cells[:, low : low + crop_px, low : low + crop_px]
    return encode_images(encoder, middle, mean=mean, std=std, px=input_px or crop_px, batch=batch, bf16=bf16)


@torch.no_grad()
def encode_images(
    encoder: nn.Module,
    images: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    px: int,
    batch: int | None = None,
    bf16: bool = False,
) -> Tensor:
    """Features float32 [N, D] of whole images uint8 [N, S, S, 3], resized to ``px``; otherwise as ``encode_cells``."""
    training = encoder.training
    encoder.eval()
    device = next((weights.device for weights in encoder.parameters()), images.device)
    center, scale = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (mean, std))
    features: list[Tensor] = []
    known = images if len(images) else images.new_zeros((1, *images.shape[1:]))  # whose width is asked for
    try:
        for part in known.split(batch or default_batch(px)):
            seen = resize(part.to(device).permute(0, 3, 1, 2).float() / 255, px=px)  # [B, 3, px, px]
            with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                features.append(encoder((seen - center) / scale).float())
    finally:  # else an error that a caller gets over would leave a training without its regularisation
        encoder.train(training)
    return torch.cat(features)[: len(images)]


def resize(images: Tensor, *, px: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow does it: float [B, 3, H, W] in [0, 1] -> [B, 3, px, px] in [0, 1]."""
    if images.shape[-1] == px:
        return images
    # The cubic overshoots at edges; Pillow clips it to a byte, and models were trained on that.
    return F.interpolate(images, size=(px, px), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def default_batch(px: int) -> int:
    """Images of ``px`` x ``px`` that are encoded at a time: the pixels of 1,024 crops of 40 px, 1,024 at most."""
    return max(1, min(1024, 1024 * 40 * 40 // (px * px)))


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), of centred features [N, D].

    1 when all features lie on a line, D when all directions are used alike, NaN when a feature is not finite.
    """
    centred = features.float() - features.float().mean(dim=0)
    if not torch.isfinite(centred).all():
        return centred.new_tensor(float("nan"))  # svdvals raises an error of its own
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
