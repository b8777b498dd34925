"""Cells to embeddings: python jobs/embed.py model=... cells=...|slides=... output=... [format=[h5ad,geojson]]."""

import sys

from lemon.config import run_job
from lemon.embed.config import EmbedConfig


def main(config: EmbedConfig) -> int:
    from lemon.embed import pipeline  # imports torch

    return pipeline.main(config)


if __name__ == "__main__":
    sys.exit(run_job("embed", EmbedConfig, main))
