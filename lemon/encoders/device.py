"""Where torch computes."""

from __future__ import annotations

import torch

from lemon.config import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of a config's ``device=``; ``auto`` is the GPU where there is one.

    Raises ConfigError for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: got {name!r}, but torch finds no GPU; expected auto or cpu here")
    return torch.device(name)
