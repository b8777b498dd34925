"""The whole chain on one real slide: python jobs/demo.py [output=demo]. Run by ``make demo``."""

import sys
from pathlib import Path

from lemon.config import EXIT_OK, DemoConfig, run_job


def main(config: DemoConfig) -> int:
    from lemon import demo

    page = demo.run(Path(config.output), synthetic=config.synthetic)
    print(f"demo: the report is {page}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job("demo", DemoConfig, main))
