"""The whole chain on one real slide: python jobs/demo.py [output=demo]. Run by ``make demo``."""

import sys
from pathlib import Path

from lemon.demo.config import DemoConfig
from lemon.errors import EXIT_OK
from lemon.runtime.job import run_job


def main(config: DemoConfig) -> int:
    from lemon.demo import job

    page = job.run(Path(config.output), synthetic=config.synthetic)
    print(f"demo: the report is {page}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job("demo", DemoConfig, main))
