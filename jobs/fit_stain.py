"""Stain statistics of a cells table: python jobs/fit_stain.py cells=... [components=10] [space=lab]."""

import sys

from lemon.errors import EXIT_OK
from lemon.pretrain.config import FitStainConfig
from lemon.runtime.job import run_job


def main(config: FitStainConfig) -> int:
    from lemon.pretrain import assemble

    path, count = assemble.fit_stain(config)
    print(f"fit_stain: {config.components} components in {config.space} of {count:,} cells in {path}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job("fit_stain", FitStainConfig, main))
