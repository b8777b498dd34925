"""Cells to embeddings: python jobs/embed.py model=... cells=...|slides=... output=... [format=[h5ad,geojson]]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("embed"))
