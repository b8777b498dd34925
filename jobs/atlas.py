"""Embeddings to a map of cells: python jobs/atlas.py embeddings=... cells=... output=atlas/ [labels=labels.csv]."""

import sys

from lemon.config import run_job
from lemon.report.atlas_config import AtlasConfig


def main(config: AtlasConfig) -> int:
    from lemon.report import atlas  # imports torch

    return atlas.main(config)


if __name__ == "__main__":
    sys.exit(run_job("atlas", AtlasConfig, main))
