"""Runs to a page that anyone can read: python jobs/report.py output=report/ [sweeps=... probes=... atlas=...]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("report"))
