"""Slides of TCGA from the GDC: python jobs/fetch_tcga.py organs=[BRCA,LUAD] slides_per_organ=50 output=slides/."""

import sys

from lemon.config import FetchConfig, run_job


def main(config: FetchConfig) -> int:
    from lemon import fetch  # after the config is known to be good

    return fetch.main(config)


if __name__ == "__main__":
    sys.exit(run_job("fetch_tcga", FetchConfig, main))
