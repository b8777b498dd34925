"""Features of cells by an encoder, and how many directions they use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lemon.schema import CROP_PX


@torch.no_grad()
def encode_cells(
    encoder: nn.Module,
    images_u8: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_px: int,
    batch: int = 1024,
) -> Tensor:
    """Features float32 [N, D] of the centre crops of uint8 [N, 60, 60, 3], in evaluation mode.

    Args:
        encoder: [B, 3, crop_px, crop_px] normalised -> [B, D]; left in the mode that it was in.
        images_u8: on the encoder's device.
        mean, std: of the three channels, in [0, 1].
        crop_px: side of the centre crop.
        batch: images at a time.
    """
    training = encoder.training
    encoder.eval()
    low = (CROP_PX - crop_px) // 2
    center, scale = (torch.tensor(value, device=images_u8.device).view(1, 3, 1, 1) for value in (mean, std))
    features = []
    for part in images_u8[:, low : low + crop_px, low : low + crop_px].split(batch):
        normalised = (part.permute(0, 3, 1, 2).float() / 255 - center) / scale  # [B, 3, crop_px, crop_px]
        features.append(encoder(normalised).float())
    encoder.train(training)
    return torch.cat(features)


def effective_rank(features: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), of centred features [N, D].

    1 when all features lie on a line, D when all directions are used alike.
    """
    centred = features.float() - features.float().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
