"""The whole chain on one real slide: python jobs/demo.py [output=demo]. Run by ``make demo``."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("demo"))
