"""torch.compile whose results are kept for the next run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = "~/.cache/lemon/compiled"


def compile_kept(function: F, **options: Any) -> F:
    """``torch.compile(function, **options)`` with kernels kept in the user's cache folder.

    By default torch keeps them in the system's temporary folder, which containers and restarts empty, so that every
    run compiles anew. ``TORCHINDUCTOR_CACHE_DIR`` names another folder; where the user has none that can be written,
    torch's default stays.
    """
    folder = Path(FOLDER).expanduser()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return cast("F", torch.compile(function, **options))
