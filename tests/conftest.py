"""What every test may use: the reference data (skipped where absent) and a scratch home for Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before Ray is imported anywhere: no token file in the home folder, no call home.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

SHARED = Path(os.environ.get("LEMON_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """A file or folder of the reference data; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"reference data {path} is absent (set LEMON_SHARED to the folder that holds it)")
    return found
