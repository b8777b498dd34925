"""Slides to single-nucleus images: python jobs/curate.py slides=... output=... (--help lists the keys)."""

import sys

from lemon.curate.config import CurateConfig
from lemon.runtime.job import run_job


def main(config: CurateConfig) -> int:
    from lemon.curate import job  # after the config is known to be good

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("curate", CurateConfig, main))
