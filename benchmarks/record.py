"""What every benchmark says of itself, and where its figures go: hardware, versions, commit, one JSON line a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lemon.runtime.store import code_version

RESULTS = Path(__file__).resolve().parent / "results"


def hardware() -> str:
    """Processor model and the cores that this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def record(name: str, figures: dict[str, Any], *, packages: tuple[str, ...] = ("numpy", "pyarrow")) -> None:
    """Print the circumstances and append the figures to ``benchmarks/results/<name>.jsonl``."""
    line = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": code_version(),
        "hardware": hardware(),
        "versions": {package: version(package) for package in packages},
        **figures,
    }
    print(f"{name}: {line['hardware']}, commit {line['commit']}, {line['versions']}")
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as stream:
        stream.write(json.dumps(line) + "\n")
