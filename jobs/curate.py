"""Slides to single-nucleus images: python jobs/curate.py slides=... output=... (--help lists the keys)."""

import sys

from lemon.config import CurateConfig, run_job


def main(config: CurateConfig) -> int:
    from lemon import curate  # after the config is known to be good

    return curate.main(config)


if __name__ == "__main__":
    sys.exit(run_job("curate", CurateConfig, main))
