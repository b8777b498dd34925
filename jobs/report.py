"""Runs to a page that anyone can read: python jobs/report.py output=report/ [sweeps=... probes=... atlas=...]."""

import sys

from lemon.config import run_job
from lemon.report.config import ReportConfig


def main(config: ReportConfig) -> int:
    from lemon.report import page  # imports torch

    return page.main(config)


if __name__ == "__main__":
    sys.exit(run_job("report", ReportConfig, main))
