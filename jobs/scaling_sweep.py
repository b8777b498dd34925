"""A study's points, pretrained and probed: python jobs/scaling_sweep.py sweep=size cells=... tasks=... output=..."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("scaling_sweep"))
