"""Slides of TCGA from the GDC: python jobs/fetch_tcga.py organs=[BRCA,LUAD] slides_per_organ=50 output=slides/."""

import sys

from lemon.fetch.config import FetchConfig
from lemon.runtime.job import run_job


def main(config: FetchConfig) -> int:
    from lemon.fetch import job  # after the config is known to be good

    return job.main(config)


if __name__ == "__main__":
    sys.exit(run_job("fetch_tcga", FetchConfig, main))
