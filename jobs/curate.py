"""Slides to single-nucleus images: python jobs/curate.py slides=... output=... (--help lists the keys)."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("curate"))
