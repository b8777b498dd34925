"""Files of weights, opened as plain tensors: the only place that calls ``torch.load``.

No code in a file is run. Whatever a damaged or hostile file provokes becomes one line that names the file; torch's own
advice, to open it without that protection, is never passed on.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from lemon.errors import DamagedError

T = TypeVar("T")

# A pickle is a small program; what a wrong one ends in depends on the byte that is wrong.
FAULTS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError),
    *(NameError, RuntimeError, SyntaxError, TypeError, ValueError, pickle.PickleError, struct.error),
    safetensors.SafetensorError,
)
_REMEDY = "expected a file of plain tensors: download or copy it again"


def read_weights(
    source: str | Path | bytes, *, label: str, device: torch.device | str = "cpu", safe: Sequence[Any] = ()
) -> Any:
    """What a .safetensors or a torch file holds: tensors, numbers, texts and containers of them.

    Args:
        source: a path, or the content of a torch file.
        label: what the file is called in an error.
        device: where the tensors are put.
        safe: further types that the file may hold, as ``torch.serialization.safe_globals`` takes them.

    Raises:
        FileNotFoundError: no such file.
        DamagedError: cut short, of another format, or asks for code to be run.
    """
    with_path = isinstance(source, str | Path)
    if with_path and not Path(source).is_file():  # type: ignore[arg-type]
        raise FileNotFoundError(f"{label}: no such file")
    if with_path and str(source).endswith(".safetensors"):
        return read_or_damaged_error(lambda: safetensors.torch.load_file(str(source), device=str(device)), label=label)
    opened: Any = io.BytesIO(source) if isinstance(source, bytes) else source
    with torch.serialization.safe_globals([*safe]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old or unknown protocol; whether the file opens is what counts
        return read_or_damaged_error(lambda: torch.load(opened, map_location=device, weights_only=True), label=label)


def read_metadata(path: str | Path, *, label: str) -> dict[str, str]:
    """The texts by name at the head of a .safetensors file. Raises as ``read_weights``."""

    def read() -> dict[str, str]:
        with safetensors.safe_open(str(path), framework="pt") as stored:
            return dict(stored.metadata() or {})

    return read_or_damaged_error(read, label=label)


def read_or_damaged_error(read: Callable[[], T], *, label: str) -> T:
    """What a reader of weights returns; whatever it ends in is a DamagedError, one line that begins with ``label``."""
    try:
        return read()
    except FAULTS as error:
        raise DamagedError(f"{label}: {_reason(error)}; {_REMEDY}") from None


def _reason(error: BaseException) -> str:
    """Why a file cannot be opened, in our words where torch would have the reader switch the protection off."""
    text = " ".join(str(error).split())
    if "weights_only" in text or "WeightsUnpickler" in text or isinstance(error, pickle.UnpicklingError):
        return "holds something else than tensors, which is not opened because it could run code, or is damaged"
    if isinstance(error, EOFError):
        return "is empty or cut short"
    return f"cannot be read as weights ({type(error).__name__}{f': {text[:100]}' if text else ''})"
