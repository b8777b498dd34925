"""Encoders x benchmarks -> scores: python jobs/probe.py models=[runs/x,resnet50] tasks=[consep-type,amibr] data=..."""

import sys

from lemon.config import run_job
from lemon.probe.config import ProbeConfig


def main(config: ProbeConfig) -> int:
    from lemon.probe import run  # imports torch
    from lemon.report import figures, tables

    code = run.main(config)
    figures.draw_cost(config.output)
    print(tables.write_table1(config.output))
    return code


if __name__ == "__main__":
    sys.exit(run_job("probe", ProbeConfig, main))
