"""What a batch of cells is for the views: uint8 RGB, 60x60 px at 0.25 um/px."""

from __future__ import annotations

import torch


def check_images(images_u8: torch.Tensor, *, side_px: int | None = None) -> None:
    """Raise ValueError unless ``images_u8`` is uint8 [B, H, W, 3] (with H = W = ``side_px`` if given)."""
    side = "H, W" if side_px is None else f"{side_px}, {side_px}"
    if not isinstance(images_u8, torch.Tensor):
        raise ValueError(f"images: got {type(images_u8).__name__}; expected a uint8 tensor [B, {side}, 3]")
    if images_u8.dtype != torch.uint8:
        raise ValueError(f"images: got dtype {images_u8.dtype}; expected torch.uint8 (0 to 255), not normalised floats")
    fits = images_u8.ndim == 4 and images_u8.shape[3] == 3 and images_u8.shape[0] > 0
    if not fits or (side_px is not None and tuple(images_u8.shape[1:3]) != (side_px, side_px)):
        got = list(images_u8.shape)
        raise ValueError(f"images: got shape {got}; expected [B, {side}, 3] with B >= 1 and the channels last")
