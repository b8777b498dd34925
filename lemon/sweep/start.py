"""Where ``lemon sweep`` begins: a plan needs none of what trains."""

from __future__ import annotations

from lemon.sweep.config import SweepConfig


def main(config: SweepConfig) -> int:
    """Print the plan of a sweep or run it; returns the exit code. Raises ConfigError."""
    if config.plan:
        from lemon.sweep.plan import main as work
    else:
        from lemon.sweep.job import main as work
    return work(config)
