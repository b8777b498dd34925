"""Encoders ready to use: a run's folder, an exported folder, or the released LEMON checkpoint."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lemon.encoders.export import CONFIG, CellInput, load_exported, triple
from lemon.encoders.features import encode_cells
from lemon.encoders.vit import load_lemon_checkpoint
from lemon.schema import CROP_PX


class Encoder(nn.Module):
    """A frozen encoder with what it expects of its input, and the name that it has in tables."""

    def __init__(self, model: nn.Module, cell_input: CellInput, *, name: str) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.cell_input = cell_input
        self.name = name

    @cached_property
    def width(self) -> int:
        """Values of an embedding."""
        return self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8)).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the weights and of what the encoder expects: equal for equal embeddings."""
        digest = hashlib.sha256(repr(self.cell_input).encode())
        for key, value in self.model.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised float [B, 3, crop_px, crop_px] -> features [B, D]."""
        return self.model(images)

    @torch.inference_mode()
    def embed(self, images_u8: np.ndarray | torch.Tensor, *, batch: int = 1024) -> torch.Tensor:
        """Features float32 [N, D] of cells uint8 [N, 60, 60, 3] at 0.25 um/px, as the cells table holds them."""
        device = next(self.model.parameters()).device
        images = torch.as_tensor(images_u8).to(device)
        of = self.cell_input
        return encode_cells(self.model, images, mean=of.mean, std=of.std, crop_px=of.crop_px, batch=batch)


def load_encoder(name_or_path: str | Path) -> Encoder:
    """Open an encoder by its path.

    Args:
        name_or_path: the output of ``jobs/pretrain.py``, its ``encoder`` folder, or the released ``lemon.pth.tar``
            (with its ``mean_std.json`` beside it, if that was downloaded).

    Raises:
        FileNotFoundError: nothing is there; the message says what is expected.
        ValueError: what is there is no encoder.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        beside = path.with_name("mean_std.json")
        model = load_lemon_checkpoint(path, mean_std=beside if beside.is_file() else None)
        known: Any = model.pretrained_cfg
        return Encoder(model, CellInput(mean=triple(known["mean"]), std=triple(known["std"])), name=path.name)
    for folder in (path, path / "encoder"):
        if (folder / CONFIG).is_file():
            return Encoder(*load_exported(folder), name=path.name)
    raise FileNotFoundError(
        f"{path}: no encoder there; expected the output of jobs/pretrain.py, a folder with {CONFIG}, or lemon.pth.tar"
    )
