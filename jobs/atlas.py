"""Embeddings to a map of cells: python jobs/atlas.py embeddings=... cells=... output=atlas/ [labels=labels.csv]."""

import sys

from lemon.cli import run_stage

if __name__ == "__main__":
    sys.exit(run_stage("atlas"))
