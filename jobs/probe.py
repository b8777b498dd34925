"""Encoders x benchmarks -> scores: python jobs/probe.py models=[runs/x,resnet50] tasks=[consep-type,amibr] data=..."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("probe"))
