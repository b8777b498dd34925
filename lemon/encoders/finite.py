"""Numbers that are none: found in weights before they are kept, and when they are opened."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def not_finite(value: Any, name: str = "") -> Iterator[str]:
    """Names of what holds NaN or infinity among tensors, numbers and containers of them; a name joins keys by dots."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            yield name
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield name
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from not_finite(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from not_finite(each, f"{name}.{index}" if name else str(index))
