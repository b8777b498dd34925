"""Embeddings to a map of cells: python jobs/atlas.py embeddings=... cells=... output=atlas/ [labels=labels.csv]."""

import sys

from lemon.atlas.config import AtlasConfig
from lemon.runtime.job import run_job


def main(config: AtlasConfig) -> int:
    from lemon.atlas import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("atlas", AtlasConfig, main))
