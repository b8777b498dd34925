"""Encoders x benchmarks -> scores: python jobs/probe.py models=[runs/x,resnet50] tasks=[consep-type,amibr] data=..."""

import sys

from lemon.probe.config import ProbeConfig
from lemon.runtime.job import run_job


def main(config: ProbeConfig) -> int:
    from lemon.probe import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("probe", ProbeConfig, main))
