"""Groups to what is different about each: python jobs/describe.py embeddings=... cells=... output=describe/."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("describe"))
