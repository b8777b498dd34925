r"""Paths as text: Arrow, JSON and a terminal take valid Unicode only, and a file's name may be any bytes.

A byte that is no UTF-8 is written as ``\xNN``, so ``Mamma_f\xfcr.svs``, in a slide's id as in its path.
"""

from __future__ import annotations

import re
from pathlib import Path

_BYTE = re.compile("[\udc80-\udcff]")
_ESCAPE = re.compile(r"\\x([89a-f][0-9a-f])")


def as_text(name: str) -> str:
    r"""A name as Python has it from the system, with ``\xNN`` for bytes that are no UTF-8."""
    return _BYTE.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", name)


def on_disk(path: str) -> str:
    """The name of a file as the system has it, from ``as_text``; any other path is returned as it is."""
    if "\\x" not in path or Path(path).exists():
        return path
    raw = _ESCAPE.sub(lambda escape: chr(0xDC00 + int(escape[1], 16)), path)
    return raw if Path(raw).exists() else path
