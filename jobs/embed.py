"""Cells to embeddings: python jobs/embed.py model=... cells=...|slides=... output=... [format=[h5ad,geojson]]."""

import sys

from lemon.embed.config import EmbedConfig
from lemon.runtime.job import run_job


def main(config: EmbedConfig) -> int:
    from lemon.embed import job  # imports torch

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("embed", EmbedConfig, main))
