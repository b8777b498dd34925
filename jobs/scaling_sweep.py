"""A study's points, pretrained and probed: python jobs/scaling_sweep.py sweep=size cells=... tasks=... output=..."""

import sys

from lemon.runtime.job import run_job
from lemon.sweep.config import SweepConfig


def main(config: SweepConfig) -> int:
    from lemon.sweep import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("scaling_sweep", SweepConfig, main))
