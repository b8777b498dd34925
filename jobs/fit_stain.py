"""Stain statistics of a cells table: python jobs/fit_stain.py cells=... [components=10] [space=lab]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("fit_stain"))
