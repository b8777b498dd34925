"""Stain statistics of a cells table: python jobs/fit_stain.py cells=... [components=10] [space=lab]."""

import sys

from lemon.config import EXIT_OK, run_job
from lemon.pretrain.config import FitStainConfig


def main(config: FitStainConfig) -> int:
    from lemon.pretrain import assemble

    path, count = assemble.fit_stain(config)
    print(f"fit_stain: {config.components} components in {config.space} of {count:,} cells in {path}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job("fit_stain", FitStainConfig, main))
