"""LEMON: from whole-slide images to a foundation model of single-nucleus morphology.

``import lemon`` is light: it pulls in no torch, no Ray and no MLflow; ``lemon.load_encoder`` does when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lemon.version import __version__

if TYPE_CHECKING:
    from lemon.encoders.open import load_encoder

__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from lemon.encoders.open import load_encoder

        return load_encoder
    raise AttributeError(f"module 'lemon' has no attribute {name!r}")
