"""Whether all that LEMON wrote in an output is still as it was written: python jobs/verify.py output=..."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("verify"))
