"""Runs to a page that anyone can read: python jobs/report.py output=report/ [sweeps=... probes=... atlas=...]."""

import sys

from lemon.report.config import ReportConfig
from lemon.runtime.job import run_job


def main(config: ReportConfig) -> int:
    from lemon.report import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("report", ReportConfig, main))
