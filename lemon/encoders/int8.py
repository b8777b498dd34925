"""Weights in a quarter of their size, for encoders that are shipped: matrices as int8 by row, the rest as float16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lemon.errors import ConfigError

SCALE = ".int8_scale"
"""Ends the name of the scales of a matrix, float32 [rows]."""

LEVELS = 127


def quantise(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with every float tensor of two dimensions or more as int8, symmetric, one scale a row.

    A value w of row r is stored as round(w / s_r) with s_r = max |w| / 127, so its error is at most s_r / 2 (absolute
    maximum quantisation by output channel, Jacob et al., CVPR 2018, section 2, without a zero point). Vectors (biases,
    norms) and tensors of a single row (class token, positions) become float16.
    """
    stored = {}
    for name, value in weights.items():
        if not value.is_floating_point():
            stored[name] = value
        elif value.ndim < 2 or len(value) == 1:
            stored[name] = value.half()
        else:
            rows = value.detach().float().flatten(1)
            scale = rows.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
            stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(value.shape)
            stored[name + SCALE] = scale
    return stored


def dequantise(stored: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The state dict of what ``quantise`` made, its matrices as float32; any other state dict as it is.

    Raises:
        ConfigError: int8 values without a scale for each row; begins with ``source``.
    """
    weights = {name: value for name, value in stored.items() if not name.endswith(SCALE)}
    for name, value in weights.items():
        if value.dtype == torch.int8:
            scale = stored.get(name + SCALE)
            if scale is None or scale.shape != value.shape[:1]:
                raise ConfigError(f"{source}: {name} is int8 without a scale for each row; download or copy it again")
            weights[name] = value.float() * scale.float().view(-1, *[1] * (value.ndim - 1))
    return weights
