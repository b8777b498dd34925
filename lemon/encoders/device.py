"""Where torch computes."""

from __future__ import annotations

import torch

from lemon.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """The device of a config's ``device=``; ``auto`` is the GPU where there is one.

    Raises ConfigError for a GPU that is not there, and for another name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device: got {name!r}; expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        n_gpus = torch.cuda.device_count() or "no"
        raise ConfigError(f"device: got {name!r}, but torch finds {n_gpus} GPU; expected auto or cpu here")
    return device
